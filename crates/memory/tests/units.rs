//! Sizes, devices and flags as text: what is read, and what each mistake is told.

use oxllama_memory::{
    Bytes, BytesError, DeviceCap, DeviceError, DeviceId, DeviceInfo, GpuSplit, Inventory,
    VirtualDevices,
};
use proptest::prelude::*;

fn size(text: &str) -> Result<Bytes, BytesError> {
    text.parse()
}

#[test]
fn sizes_are_read_in_every_unit() {
    let cases = [
        ("0B", 0),
        ("4096B", 4096),
        ("4096 b", 4096),
        ("1KiB", 1 << 10),
        ("1KB", 1 << 10),
        ("96MiB", 96 << 20),
        ("96mb", 96 << 20),
        (" 1.5GiB ", 3 << 29),
        ("1.5 GB", 3 << 29),
        (".5GiB", 1 << 29),
        ("2.GiB", 2 << 30),
        ("2TiB", 2 << 40),
        ("0.1KiB", 102),
        ("16777215TiB", 16_777_215 << 40),
        ("0.000000000000000000000000000001TiB", 0),
    ];
    for (text, bytes) in cases {
        assert_eq!(size(text), Ok(Bytes(bytes)), "{text}");
    }
}

#[test]
fn a_bare_number_is_told_its_two_meanings() {
    let error = size("24").unwrap_err();
    assert_eq!(
        error,
        BytesError::MissingUnit {
            text: "24".to_owned()
        }
    );
    assert_eq!(
        error.to_string(),
        "\"24\" has no unit: write \"24GiB\" if gigabytes are meant (the unit of ExLlamaV2's \
         gpu_split) or \"24B\" if bytes are (the unit of its reserve_vram)"
    );
}

#[test]
fn mistakes_in_sizes_are_named() {
    let not_a_number = [
        "", "  ", "GiB", "-1GiB", "+1GiB", ".GiB", ".", "1.2.3MiB", "NaN",
    ];
    for text in not_a_number {
        let expected = BytesError::NotANumber {
            text: text.trim().to_owned(),
        };
        assert_eq!(size(text), Err(expected), "{text}");
    }
    for (text, unit) in [
        ("5GiBs", "GiBs"),
        ("5 Gbit", "Gbit"),
        ("1e9B", "e9B"),
        ("3µB", "µB"),
    ] {
        let expected = BytesError::UnknownUnit {
            text: text.to_owned(),
            unit: unit.to_owned(),
        };
        assert_eq!(size(text), Err(expected), "{text}");
    }
    let too_large = [
        "16777216TiB",
        "18446744073709551616B",
        "99999999999999999999999999GiB",
    ];
    for text in too_large {
        assert_eq!(
            size(text),
            Err(BytesError::TooLarge {
                text: text.to_owned()
            }),
            "{text}"
        );
    }
    assert_eq!(
        size("5GiBs").unwrap_err().to_string(),
        "\"5GiBs\" has the unknown unit \"GiBs\": expected B, KiB, MiB, GiB or TiB"
    );
}

#[test]
fn sizes_read_as_people_write_them() {
    let cases = [
        (Bytes::ZERO, "0 B"),
        (Bytes(1023), "1023 B"),
        (Bytes(1024), "1.00 KiB"),
        (Bytes(1_048_575), "1.00 MiB"),
        (Bytes::from_mib(1280), "1.25 GiB"),
        (Bytes::from_gib(24), "24.00 GiB"),
        (Bytes::MAX, "16777216.00 TiB"),
    ];
    for (bytes, text) in cases {
        assert_eq!(bytes.to_string(), text);
    }
    assert_eq!(
        format!("{:>10}|{:<10}|", Bytes(7), Bytes(7)),
        "       7 B|7 B       |"
    );
}

#[test]
fn arithmetic_never_wraps() {
    assert_eq!(Bytes::MAX.checked_add(Bytes(1)), None);
    assert_eq!(Bytes(1).checked_sub(Bytes(2)), None);
    assert_eq!(Bytes::MAX.checked_mul(2), None);
    assert_eq!(
        Bytes::checked_sum([Bytes::MAX, Bytes::ZERO]),
        Some(Bytes::MAX)
    );
    assert_eq!(Bytes::checked_sum([Bytes::MAX, Bytes(1)]), None);
    assert_eq!(Bytes::MAX.saturating_add(Bytes(1)), Bytes::MAX);
    assert_eq!(Bytes(1).saturating_sub(Bytes(2)), Bytes::ZERO);
    assert_eq!(Bytes(3).saturating_mul(u64::MAX), Bytes::MAX);
    assert_eq!(Bytes::from_gib(u64::MAX), Bytes::MAX);
}

#[test]
fn sizes_serialize_as_integers() {
    let json = serde_json::to_string(&Bytes::from_kib(3)).unwrap();
    assert_eq!(json, "3072");
}

#[test]
fn devices_are_read_and_written() {
    let device: DeviceId = "CUDA:12".parse().unwrap();
    assert_eq!(device, DeviceId::cuda(12));
    assert_eq!(device.to_string(), "cuda:12");
    assert_eq!(
        serde_json::to_string(&DeviceId::cpu(0)).unwrap(),
        "\"cpu:0\""
    );
    assert_eq!((device.kind(), device.index()), ("cuda", 12));
    for text in [
        "",
        "cpu",
        "cpu:",
        ":0",
        "cpu:-1",
        "cpu:+1",
        "cpu:1:2",
        "c pu:0",
        "cpu:4294967296",
    ] {
        let expected = DeviceError::MalformedDevice {
            text: text.to_owned(),
        };
        assert_eq!(text.parse::<DeviceId>(), Err(expected), "{text}");
    }
}

#[test]
fn an_inventory_has_each_device_once_and_no_more_available_than_there_is() {
    let device = |id| DeviceInfo {
        available: Bytes(9),
        ..DeviceInfo::new(id, "test device", Bytes(7))
    };
    let twice = Inventory::new(vec![device(DeviceId::cpu(0)), device(DeviceId::cpu(0))]);
    assert_eq!(
        twice,
        Err(DeviceError::DuplicateDevice {
            device: DeviceId::cpu(0)
        })
    );
    let inventory = Inventory::new(vec![device(DeviceId::cpu(0)), device(DeviceId::cuda(0))]);
    for info in inventory.unwrap().devices() {
        assert_eq!(info.available, Bytes(7));
    }
    assert_eq!(
        Inventory::of_one(device(DeviceId::cpu(0))).devices()[0].available,
        Bytes(7)
    );
}

#[test]
fn splits_are_gib_per_device() {
    let split: GpuSplit = "20, 24,0,0.5".parse().unwrap();
    let expected = [
        Bytes::from_gib(20),
        Bytes::from_gib(24),
        Bytes::ZERO,
        Bytes::from_mib(512),
    ];
    assert_eq!(split.0, expected);
    assert_eq!(
        "512MiB,1".parse(),
        Ok(GpuSplit(vec![Bytes::from_mib(512), Bytes::from_gib(1)]))
    );
    for (text, entry) in [("auto", "auto"), ("20,,24", ""), ("20,-1", "-1"), ("", "")] {
        let expected = DeviceError::MalformedSplit {
            entry: entry.to_owned(),
            text: text.to_owned(),
        };
        assert_eq!(text.parse::<GpuSplit>(), Err(expected), "{text}");
    }
    let empty = DeviceError::EmptySplit {
        text: "0,0".to_owned(),
    };
    assert_eq!("0,0".parse::<GpuSplit>(), Err(empty));
    let unit = BytesError::UnknownUnit {
        text: "3furlongs".into(),
        unit: "furlongs".into(),
    };
    assert_eq!(
        "3furlongs".parse::<GpuSplit>(),
        Err(DeviceError::Size(unit))
    );
}

#[test]
fn caps_name_a_device_and_a_size() {
    let cap: DeviceCap = "cpu:0=300MiB".parse().unwrap();
    assert_eq!(
        cap,
        DeviceCap {
            device: DeviceId::cpu(0),
            limit: Bytes::from_mib(300)
        }
    );
    let malformed = DeviceError::MalformedCap {
        text: "300MiB".to_owned(),
    };
    assert_eq!("300MiB".parse::<DeviceCap>(), Err(malformed));
    let no_unit = DeviceError::Size(BytesError::MissingUnit {
        text: "300".to_owned(),
    });
    assert_eq!("cpu:0=300".parse::<DeviceCap>(), Err(no_unit));
    let device = DeviceError::MalformedDevice {
        text: "cpu".to_owned(),
    };
    assert_eq!("cpu=300MiB".parse::<DeviceCap>(), Err(device));
}

#[test]
fn virtual_devices_are_counted_or_listed() {
    let sizes = |text: &str| text.parse::<VirtualDevices>().map(|devices| devices.0);
    let mib = Bytes::from_mib;
    assert_eq!(sizes("2x300MiB"), Ok(vec![mib(300), mib(300)]));
    assert_eq!(sizes("300MiB, 200MiB"), Ok(vec![mib(300), mib(200)]));
    assert_eq!(
        sizes("2X300MiB,1GiB"),
        Ok(vec![mib(300), mib(300), mib(1024)])
    );
    for text in ["0x300MiB", "x300MiB", "-1x300MiB", "2x0B", "0B"] {
        let expected = DeviceError::MalformedVirtualDevices {
            text: text.to_owned(),
        };
        assert_eq!(sizes(text), Err(expected), "{text}");
    }
    let no_unit = DeviceError::Size(BytesError::MissingUnit {
        text: "300".to_owned(),
    });
    assert_eq!(sizes("2x300"), Err(no_unit));
    for (text, count) in [("65x1B", 65), ("18446744073709551615x1B,1B", usize::MAX)] {
        let expected = DeviceError::TooManyVirtualDevices {
            text: text.to_owned(),
            count,
        };
        assert_eq!(sizes(text), Err(expected), "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC*|[0-9.,xX= :+-]{0,40}(GiB|kb|B)?") {
        // Whatever each makes of it, an error has to be able to say so.
        let errors = [
            text.parse::<Bytes>().err().map(|error| error.to_string()),
            text.parse::<DeviceId>().err().map(|error| error.to_string()),
            text.parse::<GpuSplit>().err().map(|error| error.to_string()),
            text.parse::<DeviceCap>().err().map(|error| error.to_string()),
            text.parse::<VirtualDevices>().err().map(|error| error.to_string()),
        ];
        prop_assert!(errors.iter().flatten().all(|message| !message.is_empty()));
    }

    #[test]
    fn exact_bytes_survive_the_text(bytes: u64) {
        prop_assert_eq!(size(&format!("{bytes}B")), Ok(Bytes(bytes)));
    }

    #[test]
    fn a_displayed_size_reads_back_within_its_rounding(bytes in 0..u64::MAX / 2) {
        let read = size(&Bytes(bytes).to_string()).unwrap();
        let difference = u128::from(read.0.abs_diff(bytes));
        // Two decimals of a number of at least one: half a percent and a byte.
        prop_assert!(difference * 200 <= u128::from(bytes) + 200);
    }
}
