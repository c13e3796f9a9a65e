//! A real EXL2 file decodes to the weights that ExLlamaV2 reconstructs from it.

mod support;

use std::fs;

use oxllama_format::{Exl2Linear, ModelSource};
use serde_json::Value;
use sha2::{Digest, Sha256};

#[test]
fn decoded_weights_have_the_golden_hashes() {
    let model = "models/smollm2-135m-exl2-4.0bpw";
    let Some(shared) = support::shared_folder(model) else {
        return;
    };
    let golden = fs::read(shared.join("golden/smollm2-135m.json")).expect("the golden outputs");
    let golden: Value = serde_json::from_slice(&golden).expect("JSON");
    let hashes = golden["exl2_4.0bpw_decoded_weights"]
        .as_object()
        .expect("an object");

    let model = ModelSource::open(&shared.join(model)).expect("a valid model");
    let mut compared = 0;
    for (key, entry) in hashes.iter().filter(|(key, _)| *key != "about") {
        let linear = Exl2Linear::load(model.tensors(), key, 1.0).expect("a valid linear");
        let shape = [linear.in_features(), linear.out_features()];
        assert_eq!(entry["shape"], serde_json::json!(shape), "{key}");
        let weights = linear.decode_f16();
        let digest = Sha256::digest(bytemuck::cast_slice(&weights));
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(entry["sha256"], digest, "{key}");
        compared += 1;
    }
    assert!(compared >= 15, "only {compared} linears compared");
}
