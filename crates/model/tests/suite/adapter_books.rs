//! Adapters in the ledger's books, and those that are refused.

use oxllama_cpu::CpuDevice;
use oxllama_format::AdapterSource;
use oxllama_memory::{DeviceId, Holding, Ledger, Purpose};
use oxllama_model::{ModelError, NO_ADAPTER, Runner};

use crate::adapters::{
    PLAIN, STABLE, adapter, expected, feed_one, load_split, pair, plain_config, write_adapter,
};
use crate::families::worst;
use crate::files::Tensor;
use crate::harness::{Loaded, cpu_device};

/// What every device holds for everything.
fn books(ledger: &Ledger) -> Vec<Vec<Holding>> {
    (0..2)
        .map(|index| ledger.entries(&DeviceId::cpu(index)))
        .collect()
}

/// Bytes held for adapters on each of two devices.
fn lora_bytes(ledger: &Ledger) -> [u64; 2] {
    [0, 1].map(|index| {
        let entries = ledger.entries(&DeviceId::cpu(index));
        let of_lora = entries
            .iter()
            .filter(|entry| entry.purpose == Purpose::Lora);
        of_lora.map(|entry| entry.bytes.get()).sum()
    })
}

#[test]
fn adapters_are_in_the_books_until_they_are_unloaded() {
    let mut loaded = load_split(2, cpu_device);
    let before = books(&loaded.ledger);
    let rows = loaded.model.limits().max_rows.min(256) as u64;
    let plain = loaded
        .model
        .load_adapter(&adapter(PLAIN), 1.0)
        .expect("an adapter");
    let with_plain = lora_bytes(&loaded.ledger);
    assert!(with_plain.iter().all(|&bytes| bytes > rows * 4 * (96 + 7)));

    // Only the second device holds layer 1, and its scratch grows from rank 7 to rank 20.
    let stable = loaded
        .model
        .load_adapter(&adapter(STABLE), 1.0)
        .expect("an adapter");
    let with_both = lora_bytes(&loaded.ledger);
    assert_eq!(with_both[0], with_plain[0]);
    assert!(with_both[1] - with_plain[1] > rows * 4 * (20 - 7));

    loaded.model.unload_adapter(plain).expect("it is loaded");
    let of_scratch = lora_bytes(&loaded.ledger)[0];
    assert_eq!(of_scratch, rows * 4 * (96 + 7), "scratch alone");
    let (tokens, logits) = expected(STABLE);
    let error = worst(&feed_one(&mut loaded.model, stable.get(), &tokens), &logits);
    assert!(error < 1e-3, "after the other was unloaded: {error}");

    loaded.model.unload_adapter(stable).expect("it is loaded");
    assert_eq!(books(&loaded.ledger), before);
    let again = loaded
        .model
        .load_adapter(&adapter(PLAIN), 1.0)
        .expect("an adapter");
    assert_eq!(lora_bytes(&loaded.ledger), with_plain);
    assert!(again != plain && again != stable, "ids are not used again");
}

/// Loads an adapter that must be refused, and checks that nothing has changed.
fn refused(loaded: &mut Loaded<CpuDevice>, source: &AdapterSource, scale: f32) -> ModelError {
    let tokens = [5, 9, 31];
    let before = books(&loaded.ledger);
    let logits = feed_one(&mut loaded.model, NO_ADAPTER, &tokens);
    let error = loaded
        .model
        .load_adapter(source, scale)
        .expect_err("refused");
    assert_eq!(books(&loaded.ledger), before, "{error}");
    assert_eq!(feed_one(&mut loaded.model, NO_ADAPTER, &tokens), logits);
    error
}

#[test]
fn a_failed_load_of_an_adapter_changes_nothing() {
    let mut loaded = load_split(2, cpu_device);
    let error = refused(&mut loaded, &adapter(PLAIN), f32::NAN);
    assert!(matches!(error, ModelError::AdapterScale { .. }), "{error}");

    // Room for the scratch of the first device, but not of the second.
    let room = loaded
        .ledger
        .usage(&DeviceId::cpu(1))
        .expect("a device")
        .available;
    let ledger = loaded.ledger.clone();
    let all = ledger.reserve(&DeviceId::cpu(1), "other", Purpose::Weights, room);
    let all = all.expect("what is available");
    let error = refused(&mut loaded, &adapter(PLAIN), 1.0);
    assert!(matches!(error, ModelError::Shortfall(_)), "{error}");
    drop(all);

    // A number that is none, found when everything is reserved.
    let mut tensors = pair("model.layers.1.mlp.down_proj", 3, (96, 64)).to_vec();
    let bytes = tensors[1].bytes.as_mut().expect("data");
    bytes[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    let directory = write_adapter(&plain_config(3), tensors);
    let source = AdapterSource::open(directory.path()).expect("a sound header");
    let error = refused(&mut loaded, &source, 1.0);
    assert!(error.to_string().contains("NaN"), "{error}");
    assert!(error.to_string().contains("down_proj.lora_B"), "{error}");
}

#[test]
fn adapters_of_other_models_are_refused() {
    let mut loaded = load_split(2, cpu_device);
    let with = |tensors: &[[Tensor; 2]], rank: usize| {
        let directory = write_adapter(&plain_config(rank), tensors.concat());
        AdapterSource::open(directory.path()).map(|source| (directory, source))
    };
    let q_proj = "model.layers.0.self_attn.q_proj";
    let cases = [
        (
            vec![pair("lm_head", 2, (64, 103))],
            2,
            "module `lm_head` is not known",
        ),
        (
            vec![pair("model.layers.0.mlp.experts.3.w1", 2, (64, 96))],
            2,
            "one of self_attn.q_proj, self_attn.k_proj",
        ),
        (
            vec![pair("model.layers.2.mlp.up_proj", 2, (64, 96))],
            2,
            "of a layer that the model does not have: expected model.layers.N, N below 2",
        ),
        (
            vec![pair(
                "model.layers.99999999999999999999999.mlp.up_proj",
                2,
                (64, 96),
            )],
            2,
            "of a layer that the model does not have",
        ),
        (
            vec![pair("model.layers.+1.mlp.up_proj", 2, (64, 96))],
            2,
            "is not known",
        ),
        (
            vec![pair(q_proj, 2, (65, 64))],
            2,
            "has in_features 65: expected 64",
        ),
        (
            vec![pair(q_proj, 2, (64, 32))],
            2,
            "has out_features 32: expected 64",
        ),
        (
            vec![pair("model.layers.0.self_attn.qkv_proj", 2, (64, 64))],
            2,
            "has out_features 64: expected 192",
        ),
        (
            vec![pair(q_proj, 97, (64, 64))],
            97,
            "has rank 97: expected at most 96",
        ),
        (
            vec![
                pair(
                    "language_model.model.layers.0.self_attn.q_proj",
                    2,
                    (64, 64),
                ),
                pair(q_proj, 2, (64, 64)),
            ],
            2,
            "under another name as well",
        ),
    ];
    for (tensors, rank, expected) in cases {
        let (_directory, source) = with(&tensors, rank).expect("a sound directory");
        let error = refused(&mut loaded, &source, 1.0).to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    // The widest rank that fits runs within the step's scratch.
    let (_directory, source) = with(&[pair(q_proj, 96, (64, 64))], 96).expect("sound");
    let id = loaded.model.load_adapter(&source, 1.0).expect("an adapter");
    feed_one(&mut loaded.model, id.get(), &[5, 9, 31]);
}
