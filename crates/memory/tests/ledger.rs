//! The ledger's books balance whatever is done to them, from however many threads.

use std::sync::{Arc, Barrier};

use oxllama_memory::{
    Bytes, DeviceId, DeviceInfo, Holding, Inventory, Ledger, Purpose, Reservation,
};
use proptest::prelude::*;

const LIMIT: Bytes = Bytes(1000);

fn two_devices() -> Ledger {
    let device = |index| DeviceInfo::new(DeviceId::cpu(index), "test device", LIMIT);
    Ledger::new(&Inventory::new(vec![device(0), device(1)]).unwrap())
}

/// Both halves of the invariant: the sums agree with each other and with `held`.
fn assert_balanced(ledger: &Ledger, device: &DeviceId, held: &[Reservation]) {
    let usage = ledger.usage(device).unwrap();
    assert_eq!(usage.limit, LIMIT);
    assert_eq!(usage.used.checked_add(usage.available), Some(LIMIT));
    let entries = ledger.entries(device);
    assert_eq!(
        Bytes::checked_sum(entries.iter().map(|entry| entry.bytes)),
        Some(usage.used)
    );
    let on_device = held
        .iter()
        .filter(|reservation| reservation.device() == device);
    let held_bytes = Bytes::checked_sum(on_device.map(Reservation::bytes));
    assert_eq!(held_bytes, Some(usage.used));
    assert!(entries.iter().all(|entry| !entry.bytes.is_zero()));
}

#[test]
fn a_reservation_holds_its_bytes_until_it_is_dropped() {
    let ledger = two_devices();
    let device = DeviceId::cpu(0);
    let weights = ledger
        .reserve(&device, "llama", Purpose::Weights, Bytes(600))
        .unwrap();
    let cache = ledger
        .reserve(&device, "llama", Purpose::KvCache, Bytes(400))
        .unwrap();
    let entry = |purpose, bytes| Holding {
        owner: "llama".to_owned(),
        purpose,
        bytes,
    };
    let expected = [
        entry(Purpose::Weights, Bytes(600)),
        entry(Purpose::KvCache, Bytes(400)),
    ];
    assert_eq!(ledger.entries(&device), expected);
    assert_eq!(ledger.usage(&device).unwrap().available, Bytes::ZERO);
    assert_eq!(ledger.usage(&DeviceId::cpu(1)).unwrap().available, LIMIT);
    assert_eq!(
        ledger.inventory().get(&device).unwrap().available,
        Bytes::ZERO
    );
    assert_eq!(ledger.inventory().get(&device).unwrap().capacity, LIMIT);
    drop(weights);
    assert_eq!(ledger.usage(&device).unwrap().available, Bytes(600));
    drop(cache);
    assert_eq!(ledger.entries(&device), []);
}

#[test]
fn a_shortfall_names_device_sizes_and_holders() {
    let ledger = Ledger::for_device(DeviceId::cuda(1), Bytes::from_gib(24));
    let device = DeviceId::cuda(1);
    let _weights = ledger
        .reserve(&device, "qwen", Purpose::Weights, Bytes::from_gib(20))
        .unwrap();
    let _cache = ledger
        .reserve(&device, "qwen", Purpose::KvCache, Bytes::from_gib(2))
        .unwrap();
    let shortfall = ledger
        .reserve(&device, "llama", Purpose::Weights, Bytes::from_gib(3))
        .unwrap_err();
    assert_eq!(shortfall.needed, Bytes::from_gib(3));
    assert_eq!(shortfall.available, Bytes::from_gib(2));
    assert_eq!(shortfall.capacity, Some(Bytes::from_gib(24)));
    assert_eq!(
        shortfall.to_string(),
        "device cuda:1 has too little memory: 3.00 GiB needed, 2.00 GiB available of 24.00 GiB; \
         held: 20.00 GiB weights of qwen, 2.00 GiB kv cache of qwen"
    );
    assert_eq!(ledger.usage(&device).unwrap().used, Bytes::from_gib(22));
}

#[test]
fn a_shortfall_of_few_bytes_shows_them() {
    let ledger = Ledger::for_device(DeviceId::cpu(0), Bytes::from_gib(1));
    let needed = Bytes(Bytes::from_gib(1).0 + 1);
    let shortfall = ledger
        .reserve(&DeviceId::cpu(0), "m", Purpose::Lora, needed)
        .unwrap_err();
    assert_eq!(
        shortfall.to_string(),
        "device cpu:0 has too little memory: 1.00 GiB needed, 1.00 GiB available of 1.00 GiB \
         (1073741825 B needed, 1073741824 B available)"
    );
}

#[test]
fn an_unknown_device_holds_nothing() {
    let ledger = two_devices();
    let device = DeviceId::cuda(7);
    let shortfall = ledger
        .reserve(&device, "m", Purpose::Recordings, Bytes::ZERO)
        .unwrap_err();
    assert_eq!(shortfall.capacity, None);
    assert_eq!(
        shortfall.to_string(),
        "device cuda:7 is unknown: 0 B were to be reserved there, but it is not in the inventory"
    );
    assert_eq!(ledger.usage(&device), None);
    assert_eq!(ledger.entries(&device), []);
}

#[test]
fn only_what_was_available_at_the_start_can_be_reserved() {
    let info = DeviceInfo {
        available: Bytes(40),
        ..DeviceInfo::new(DeviceId::cpu(0), "busy device", Bytes(100))
    };
    let ledger = Ledger::new(&Inventory::of_one(info));
    assert_eq!(ledger.usage(&DeviceId::cpu(0)).unwrap().limit, Bytes(40));
    assert!(
        ledger
            .reserve(&DeviceId::cpu(0), "m", Purpose::Weights, Bytes(41))
            .is_err()
    );
}

#[test]
fn splitting_and_merging_move_bytes_without_changing_the_books() {
    let ledger = two_devices();
    let device = DeviceId::cpu(1);
    let mut plan = ledger
        .reserve(&device, "m", Purpose::Workspace, Bytes(100))
        .unwrap();
    let buffer = plan.split(Bytes(30)).unwrap();
    assert_eq!((plan.bytes(), buffer.bytes()), (Bytes(70), Bytes(30)));
    assert_eq!(
        (buffer.owner(), buffer.purpose()),
        ("m", Purpose::Workspace)
    );
    assert_eq!(ledger.usage(&device).unwrap().used, Bytes(100));

    let error = plan.split(Bytes(71)).unwrap_err();
    assert_eq!((error.requested, error.held), (Bytes(71), Bytes(70)));
    assert_eq!(
        error.to_string(),
        "cannot take 71 B from a reservation of 70 B for the workspace of m on cpu:1: plan at \
         least 1 B more"
    );
    assert_eq!(plan.bytes(), Bytes(70));

    plan.merge(buffer).unwrap();
    assert_eq!(plan.bytes(), Bytes(100));
    assert_eq!(ledger.usage(&device).unwrap().used, Bytes(100));

    let other_purpose = ledger
        .reserve(&device, "m", Purpose::Recordings, Bytes(1))
        .unwrap();
    let other_owner = ledger
        .reserve(&device, "n", Purpose::Workspace, Bytes(1))
        .unwrap();
    let other_device = ledger
        .reserve(&DeviceId::cpu(0), "m", Purpose::Workspace, Bytes(1))
        .unwrap();
    let other_ledger = two_devices()
        .reserve(&device, "m", Purpose::Workspace, Bytes(1))
        .unwrap();
    for other in [other_purpose, other_owner, other_device, other_ledger] {
        let refused = plan.merge(other).unwrap_err();
        assert_eq!(refused.bytes(), Bytes(1));
    }
    drop(plan);
    assert_eq!(ledger.usage(&device).unwrap().used, Bytes::ZERO);
}

#[test]
fn a_panic_in_the_middle_of_use_gives_everything_back() {
    let ledger = two_devices();
    let device = DeviceId::cpu(0);
    let held = ledger.clone();
    let panicked = std::thread::spawn(move || {
        let mut all = held
            .reserve(&DeviceId::cpu(0), "m", Purpose::Weights, LIMIT)
            .unwrap();
        let _part = all.split(Bytes(10)).unwrap();
        panic!("deliberate");
    })
    .join();
    assert!(panicked.is_err());
    assert_eq!(ledger.usage(&device).unwrap().available, LIMIT);
    assert!(
        ledger
            .reserve(&device, "m", Purpose::Weights, LIMIT)
            .is_ok()
    );
}

/// One thing to do with the ledger; indices are taken modulo what there is.
#[derive(Clone, Copy, Debug)]
enum Action {
    Reserve {
        device: u32,
        owner: usize,
        bytes: u64,
    },
    Drop {
        index: usize,
    },
    Split {
        index: usize,
        bytes: u64,
    },
    Merge {
        first: usize,
        second: usize,
    },
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        3 => (0..2_u32, 0..3_usize, 0..500_u64)
            .prop_map(|(device, owner, bytes)| Action::Reserve { device, owner, bytes }),
        2 => any::<usize>().prop_map(|index| Action::Drop { index }),
        2 => (any::<usize>(), 0..300_u64)
            .prop_map(|(index, bytes)| Action::Split { index, bytes }),
        1 => (any::<usize>(), any::<usize>())
            .prop_map(|(first, second)| Action::Merge { first, second }),
    ];
    proptest::collection::vec(action, 1..60)
}

/// Does `action` with what one thread holds.
fn act(ledger: &Ledger, held: &mut Vec<Reservation>, action: Action) {
    match action {
        Action::Reserve {
            device,
            owner,
            bytes,
        } => {
            let device = DeviceId::cpu(device);
            let owner = ["llama", "qwen", "gemma"][owner];
            match ledger.reserve(&device, owner, Purpose::Weights, Bytes(bytes)) {
                Ok(reservation) => held.push(reservation),
                Err(shortfall) => {
                    assert!(shortfall.available < shortfall.needed);
                    let sum = shortfall.holders.iter().map(|holding| holding.bytes);
                    let used = Bytes::checked_sum(sum).unwrap();
                    assert_eq!(used.checked_add(shortfall.available), Some(LIMIT));
                }
            }
        }
        Action::Drop { index } if !held.is_empty() => {
            held.swap_remove(index % held.len());
        }
        Action::Split { index, bytes } if !held.is_empty() => {
            let index = index % held.len();
            let before = held[index].bytes();
            match held[index].split(Bytes(bytes)) {
                Ok(part) => held.push(part),
                Err(_) => assert!(before < Bytes(bytes)),
            }
        }
        Action::Merge { first, second } if !held.is_empty() => {
            let other = held.swap_remove(second % held.len());
            if held.is_empty() {
                held.push(other);
            } else {
                let first = first % held.len();
                if let Err(refused) = held[first].merge(other) {
                    held.push(refused);
                }
            }
        }
        Action::Drop { .. } | Action::Split { .. } | Action::Merge { .. } => {}
    }
}

proptest! {
    #[test]
    fn the_books_balance_after_every_action(actions in actions()) {
        let ledger = two_devices();
        let mut held = Vec::new();
        for action in actions {
            act(&ledger, &mut held, action);
            assert_balanced(&ledger, &DeviceId::cpu(0), &held);
            assert_balanced(&ledger, &DeviceId::cpu(1), &held);
        }
        drop(held);
        assert_balanced(&ledger, &DeviceId::cpu(0), &[]);
        assert_balanced(&ledger, &DeviceId::cpu(1), &[]);
    }

    #[test]
    fn the_books_balance_among_threads(scripts in proptest::collection::vec(actions(), 4)) {
        let ledger = two_devices();
        let start = Arc::new(Barrier::new(scripts.len()));
        let threads: Vec<_> = scripts
            .into_iter()
            .map(|script| {
                let (ledger, start) = (ledger.clone(), Arc::clone(&start));
                std::thread::spawn(move || {
                    let mut held = Vec::new();
                    start.wait();
                    for action in script {
                        act(&ledger, &mut held, action);
                        let usage = ledger.usage(&DeviceId::cpu(0)).unwrap();
                        assert_eq!(usage.used.checked_add(usage.available), Some(LIMIT));
                    }
                    held
                })
            })
            .collect();
        let held: Vec<Reservation> =
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_balanced(&ledger, &DeviceId::cpu(0), &held);
        assert_balanced(&ledger, &DeviceId::cpu(1), &held);
        drop(held);
        assert_balanced(&ledger, &DeviceId::cpu(0), &[]);
    }
}

#[test]
fn the_host_has_an_account_and_is_no_device_to_plan_for() {
    let devices = Inventory::of_one(DeviceInfo::new(DeviceId::cuda(0), "gpu", Bytes(100)));
    let host = DeviceInfo::new(DeviceId::cpu(0), "host", Bytes(50));
    let ledger = Ledger::with_host(&devices, &host);
    let held = ledger
        .reserve(&host.id, "model", Purpose::Weights, Bytes(30))
        .unwrap();
    let available = |ledger: &Ledger| ledger.usage(&host.id).map(|usage| usage.available);
    assert_eq!(available(&ledger), Some(Bytes(20)));
    assert_eq!(ledger.inventory(), devices);
    let shortfall = ledger
        .reserve(&host.id, "model", Purpose::Weights, Bytes(21))
        .unwrap_err();
    assert_eq!(shortfall.available, Bytes(20));
    drop(held);
    assert_eq!(available(&ledger), Some(Bytes(50)));
}
