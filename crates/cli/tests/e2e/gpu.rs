//! GPUs that cannot be used, that fail, and that are full: with a driver of the host's memory.

use oxllama_fake_driver::{VARIABLE, environment};
use serde_json::Value;

use crate::common::{Output, Oxllama};
use crate::support::{json, tiny};

/// A command on the fake driver's machine of these settings.
fn on(settings: &str) -> Oxllama {
    let command = Oxllama::new().env(VARIABLE, settings);
    let environment = environment();
    environment
        .into_iter()
        .fold(command, |command, (name, value)| command.env(name, value))
}

fn devices(settings: &str) -> Value {
    json(&on(settings).args(["devices", "--json"]).run().succeeded())
}

fn generate(settings: &str, device: &str) -> Output {
    on(settings)
        .arg("generate")
        .arg(tiny("llama"))
        .args([
            "--prompt",
            "hello",
            "--greedy",
            "--max-tokens",
            "6",
            "--min-tokens",
            "6",
        ])
        .args(["--device", device])
        .run()
}

#[test]
fn a_gpu_answers_as_the_cpu_does() {
    let on_cpu = generate("devices=0", "cpu").succeeded();
    let on_gpu = generate("kernels=on capability=8.0", "cuda").succeeded();
    assert!(!on_cpu.stdout.is_empty());
    assert_eq!(on_gpu.stdout, on_cpu.stdout);
    // The same kernels, doing nothing.
    let nothing = generate("kernels=off capability=8.0", "cuda").succeeded();
    assert_ne!(nothing.stdout, on_cpu.stdout);
}

#[test]
fn a_gpu_that_cannot_be_used_says_why_and_what_to_do() {
    let old = "CUDA 11.8, but 12.0 is needed: update the driver";
    for (settings, reason, is_told) in [
        // As on any machine without a GPU: not worth a word.
        (
            "devices=0",
            "check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
            false,
        ),
        ("init=803", "restart the machine", true),
        ("init=34", "take its folder out of LD_LIBRARY_PATH", true),
        ("driver=11080", old, true),
    ] {
        let found = devices(settings);
        assert_eq!(found["gpus"], Value::Array(Vec::new()), "{settings}");
        let told = found["no_gpus"].as_str().expect("a reason");
        assert!(told.contains(reason), "{settings}: {told}");
        generate(settings, "cuda").failed_with(&[reason, "--device cpu does without"]);
        let on_cpu = generate(settings, "auto").succeeded();
        assert!(!on_cpu.stdout.is_empty(), "{settings}");
        assert_eq!(on_cpu.stderr.contains(reason), is_told, "{on_cpu:?}");
    }
}

#[test]
fn a_gpu_that_is_too_old_is_listed_and_refused() {
    let needed = "compute capability 7.5; 8.0 (Ampere, 2020) or newer is needed";
    let gpu = &devices("capability=7.5")["gpus"][0];
    assert_eq!(gpu["compute_capability"], "7.5");
    assert_eq!(gpu["available_bytes"], Value::Null);
    let unusable = gpu["unusable"].as_str().expect("a reason");
    assert!(unusable.contains(needed), "{unusable}");
    generate("capability=7.5", "cuda").failed_with(&[needed, "--device cpu"]);
    let on_cpu = generate("capability=7.5", "auto").succeeded();
    assert!(on_cpu.stderr.contains("running on the CPU"), "{on_cpu:?}");
    assert!(on_cpu.stderr.contains(needed), "{on_cpu:?}");
}

#[test]
fn devices_tells_who_uses_a_gpu() {
    let found = devices("devices=2 others=536870912");
    assert_eq!(found["driver_version"], "580.00.1");
    assert_eq!(found["no_gpus"], Value::Null);
    let gpus = found["gpus"].as_array().expect("a list");
    assert_eq!(gpus.len(), 2);
    for (index, gpu) in gpus.iter().enumerate() {
        assert_eq!(gpu["id"], format!("cuda:{index}"));
        assert_eq!(gpu["unusable"], Value::Null);
        assert_eq!(gpu["temperature_celsius"], 41);
        assert_eq!(gpu["processes"][0]["name"], "greedy");
        assert_eq!(gpu["processes"][0]["bytes"], 536_870_912);
        let free = gpu["available_bytes"].as_u64().expect("a size");
        assert!(free <= 536_870_912, "{free}");
    }
    let page = on("others=536870912")
        .arg("devices")
        .run()
        .succeeded()
        .stdout;
    for part in [
        "driver 580.00.1",
        "41 °C, 74 W",
        "512.00 MiB held by greedy (process 4242)",
    ] {
        assert!(page.contains(part), "{part}: {page}");
    }
    let without = devices("nvml=off others=536870912");
    assert_eq!(without["driver_version"], Value::Null);
    assert_eq!(without["gpus"][0]["unusable"], Value::Null);
    assert_eq!(without["gpus"][0]["processes"], Value::Array(Vec::new()));
}

#[test]
fn a_plan_has_room_for_recorded_steps_on_a_gpu_alone() {
    let plan = |device: &str, more: &[&str]| {
        let plan = on("")
            .arg("plan")
            .arg(tiny("llama"))
            .args(["--device", device]);
        plan.args(more).run()
    };
    let recordings = |batch: &str| {
        let answer = json(&plan("cuda", &["--json", "--batch", batch]).succeeded());
        let recordings = &answer["plan"]["totals"]["recordings"];
        recordings.as_u64().expect("a size")
    };
    assert!(recordings("1") > 0);
    assert!(recordings("8") > recordings("1"));
    let table = plan("cuda", &[]).succeeded().stdout;
    assert!(table.contains("workspace  recordings"), "{table}");
    let table = plan("cpu", &[]).succeeded().stdout;
    assert!(!table.contains("recordings"), "{table}");
    // Less than those of one sequence.
    let capped = plan("cuda", &["--cap", "cuda:0=1MiB"]);
    capped.failed_with(&["does not fit", "cuda:0", "short by"]);
}

#[test]
fn generation_ends_with_the_device_s_error() {
    // Kernels that do nothing give every token the same logit.
    generate("", "cuda").succeeded();
    let full = generate("fault=cuMemAlloc_v2:9:2", "cuda");
    full.failed_with(&["cuda:0 is out of memory", "allocating", "free now"]);
    let lost = generate("fault=cuGraphLaunch:0:719:sticky", "cuda");
    lost.failed_with(&["cuda:0 is lost", "unspecified launch failure", "restart"]);
}
