//! `oxllama generate --input jobs.jsonl --output answers.jsonl`

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::{Output, Oxllama};
use crate::support::{generate, ids, tiny};

/// A file of jobs and a place for its answers, in a home of their own.
struct Batch {
    home: Oxllama,
}

impl Batch {
    fn new(lines: &[Value]) -> Self {
        let batch = Self {
            home: Oxllama::new(),
        };
        batch.write(lines);
        batch
    }

    fn write(&self, lines: &[Value]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        fs::write(self.input(), text).unwrap();
    }

    fn input(&self) -> PathBuf {
        self.home.path("jobs.jsonl")
    }

    fn output(&self) -> PathBuf {
        self.home.path("answers.jsonl")
    }

    fn command(&self, model: &str, arguments: &[&str]) -> Oxllama {
        let command = self.home.again().arg("generate").arg(model);
        let files = ["--input", "jobs.jsonl", "--output", "answers.jsonl"];
        command.args(files).args(arguments)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let model = tiny("llama");
        let usual = ["--context", "128", "-n", "12", "--greedy"];
        self.command(model.to_str().unwrap(), &[&usual, arguments].concat())
            .run()
    }

    /// Fails before there is a model to load.
    fn refused(&self, texts: &[&str]) {
        self.command("no-such-model", &[]).run().failed_with(texts);
    }

    fn lines(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.output()).unwrap();
        assert!(text.ends_with('\n'), "{text}");
        let lines = text.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The answers by id; there is one for each.
    fn answers(&self) -> BTreeMap<String, Value> {
        let lines = self.lines();
        let count = lines.len();
        let id = |line: &Value| line["custom_id"].as_str().unwrap().to_owned();
        let answers: BTreeMap<_, _> = lines.into_iter().map(|line| (id(&line), line)).collect();
        assert_eq!(answers.len(), count);
        answers
    }
}

fn jobs(count: usize) -> Vec<Value> {
    let job =
        |index| json!({"custom_id": format!("job-{index}"), "prompt": format!("hello {index}")});
    (0..count).map(job).collect()
}

#[test]
fn jobs_are_answered_as_each_is_alone() {
    let mut lines = jobs(5);
    lines[1]["max_tokens"] = json!(3);
    lines[2]["temperature"] = json!(1.5);
    lines[2]["top_k"] = json!(0);
    lines[2]["seed"] = json!(11);
    lines[3]["logprobs"] = json!(true);
    lines[3]["top_logprobs"] = json!(2);
    lines[4] = json!({
        "custom_id": "job-4",
        "messages": [{"role": "user", "content": "hello"}]
    });
    let batch = Batch::new(&lines);
    let output = batch.run(&[]).succeeded();
    assert_eq!(output.stdout, "");
    assert!(
        output.stderr.contains("5 jobs done, 0 failed"),
        "{output:?}"
    );
    let answers = batch.answers();
    let alone = |prompt: &str, options: &[&str]| {
        let usual = ["--context", "128", "-n", "12"];
        generate(&tiny("llama"), prompt, &[&usual, options].concat())
    };
    let cases = [
        (0, alone("hello 0", &["--greedy"])),
        (3, alone("hello 3", &["--greedy", "--logprobs", "2"])),
        (4, alone("hello", &["--greedy", "--chat"])),
    ];
    for (index, alone) in &cases {
        let answer = &answers[&format!("job-{index}")];
        for field in [
            "text",
            "token_ids",
            "prompt_token_ids",
            "finish_reason",
            "logprobs",
        ] {
            assert_eq!(answer[field], alone[field], "{index}: {field}");
        }
        assert_eq!(answer["timings"]["generated_tokens"], 12);
    }
    assert_eq!(ids(&answers["job-1"]["token_ids"]).len(), 3);

    // One at a time is the same too.
    let token_ids = |answers: &BTreeMap<String, Value>| -> Vec<Value> {
        answers.values().map(|a| a["token_ids"].clone()).collect()
    };
    let expected = token_ids(&answers);
    for way in [["--batch", "1"], ["--batch", "3"]] {
        fs::remove_file(batch.output()).unwrap();
        batch.run(&way).succeeded();
        assert_eq!(token_ids(&batch.answers()), expected, "{way:?}");
    }
}

#[test]
fn a_job_that_fails_says_why_and_is_tried_again() {
    let long = "hello world ".repeat(200);
    let bad = [
        (
            json!({"prompt": "a", "temperature": -1}),
            "temperature is -1",
        ),
        (json!({"prompt": "a", "top_p": "high"}), "top_p is"),
        (json!({"prompt": "a", "max_token": 3}), "is max_tokens"),
        (
            json!({"prompt": "a", "temprature": 1}),
            "is temperature meant?",
        ),
        (json!({"prompt": long}), "holds 128"),
        (
            json!({"prompt": ""  , "stop": [""]}),
            "stop string 0 is empty",
        ),
        (json!({"prompt": [1, 4_000]}), "token id 4000"),
        (json!({"prompt": 7}), "prompt is 7, expected a text"),
        (json!({"messages": "hi"}), "messages: "),
        (json!({"messages": []}), "empty list"),
        (json!({"messages": [{"content": "hi"}]}), "role"),
        (
            json!({"prompt": "a", "messages": []}),
            "both prompt and messages",
        ),
        (json!({}), "neither prompt nor messages"),
        (json!({"prompt": "a", "n": 0}), "n is 0"),
        (json!({"prompt": "a", "n": 1e19 as u64}), "n is 1000"),
        (
            json!({"prompt": "a", "min_tokens": 50}),
            "min_new_tokens is 50",
        ),
        (
            json!({"prompt": "a", "guided_regex": "(("}),
            "regular expression",
        ),
        (
            json!({"prompt": "a", "guided_regex": "a", "guided_choice": ["a"]}),
            "both guided_regex and guided_choice",
        ),
        (
            json!({"prompt": "a", "response_format": "json"}),
            "response_format is",
        ),
        (
            json!({"prompt": "a", "response_format": {"type": "json_schema"}}),
            "no schema",
        ),
        (
            json!({"prompt": "a", "guided_json": {"type": "object", "minProperties": "x"}}),
            "schema",
        ),
        (
            json!({"prompt": "a", "cfg_scale": 2}),
            "without negative_prompt",
        ),
        (json!({"prompt": "a", "logprobs": "yes"}), "logprobs is"),
        (json!({"prompt": "a", "seed": 1.5}), "seed is 1.5"),
        (json!({"body": {"prompt": "a"}}), "OpenAI's `body`"),
    ];
    let mut lines = jobs(2);
    for (index, (job, _)) in bad.iter().enumerate() {
        let mut job = job.clone();
        job["custom_id"] = json!(format!("bad-{index:02}"));
        lines.insert(1, job);
    }
    let batch = Batch::new(&lines);
    let failed = format!("2 jobs done, {} failed", bad.len());
    batch.run(&[]).failed_with(&[&failed, "bad-", "says why"]);
    let answers = batch.answers();
    for (index, (_, why)) in bad.iter().enumerate() {
        let answer = &answers[&format!("bad-{index:02}")];
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(why), "expected {why:?} in {error:?}");
        assert_eq!(answer.as_object().unwrap().len(), 2);
    }
    let first = answers["job-0"].clone();
    assert_eq!(ids(&first["token_ids"]).len(), 12);

    // Mended, they and only they run again.
    for line in &mut lines {
        if line["custom_id"].as_str().unwrap().starts_with("bad") {
            *line = json!({"custom_id": line["custom_id"], "prompt": "mended"});
        }
    }
    batch.write(&lines);
    let again = batch.run(&[]).succeeded();
    let done = format!("{} jobs done, 0 failed, 2 done before", bad.len());
    assert!(again.stderr.contains(&done), "{again:?}");
    let answers = batch.answers();
    assert_eq!(answers.len(), lines.len());
    // The line itself, times included.
    assert_eq!(answers["job-0"], first);
    assert!(answers.values().all(|answer| answer.get("error").is_none()));
    // With nothing left, no model is needed.
    let output = batch.command("no-such-model", &[]).run().succeeded();
    assert!(output.stderr.contains("answered in answers.jsonl already"));
    let left: Vec<_> = fs::read_dir(batch.home.path("")).unwrap().collect();
    assert_eq!(left.len(), 2, "a temporary file is left: {left:?}");
}

#[test]
fn an_unfinished_last_line_is_done_again() {
    let batch = Batch::new(&jobs(3));
    batch.run(&[]).succeeded();
    let whole = batch.answers();
    let text = fs::read_to_string(batch.output()).unwrap();
    let last = text.trim_end().rfind('\n').unwrap() + 1;
    for end in [text.len() - 1, text.len() - 9, last + 16, last + 3, last] {
        fs::write(batch.output(), &text.as_bytes()[..end]).unwrap();
        let output = batch.run(&[]).succeeded();
        assert!(
            output
                .stderr
                .contains("1 job done, 0 failed, 2 done before"),
            "{end}: {output:?}"
        );
        let answers = batch.answers();
        assert_eq!(answers.len(), 3);
        for (id, answer) in &answers {
            assert_eq!(answer["token_ids"], whole[id]["token_ids"]);
        }
    }
}

#[test]
fn bad_files_are_refused_before_a_model_is_loaded() {
    let batch = Batch::new(&[]);
    let input = |text: &[u8]| fs::write(batch.input(), text).unwrap();
    let good = "{\"custom_id\": \"a\", \"prompt\": \"b\"}\n";
    batch.refused(&["jobs.jsonl holds no job"]);
    input(format!("{good}\n{good}").as_bytes());
    batch.refused(&["jobs.jsonl", "lines 1 and 3", "custom_id \"a\""]);
    input(format!("{good}{{\"prompt\": \n").as_bytes());
    batch.refused(&["jobs.jsonl, line 2", "not JSON at column", "prompt"]);
    input(format!("{good}[1, 2]\n").as_bytes());
    batch.refused(&["jobs.jsonl, line 2", "found a list", "JSON object"]);
    input(b"{\"prompt\": \"b\"}\n");
    batch.refused(&["jobs.jsonl, line 1", "no custom_id"]);
    input(b"{\"custom_id\": 7, \"prompt\": \"b\"}\n");
    batch.refused(&["line 1", "custom_id is 7"]);
    input(b"{\"custom_id\": \"\", \"prompt\": \"b\"}\n");
    batch.refused(&["line 1", "not empty"]);
    input(b"{\"custom_id\": \"\xff\"}\n");
    batch.refused(&["line 1", "not UTF-8 (byte 16"]);
    fs::remove_file(batch.input()).unwrap();
    batch.refused(&["cannot read the jobs in jobs.jsonl"]);
    // Nothing was made of any of this.
    assert!(!batch.output().exists());
}

#[test]
fn an_output_that_holds_no_answers_is_left_alone() {
    let batch = Batch::new(&jobs(1));
    let texts = [
        "my diary\n",
        "my diary",
        "{\"custom_id\": \"a\"}\n",
        "[]\n",
        "\u{0}\u{0}\n",
    ];
    for text in texts {
        fs::write(batch.output(), text).unwrap();
        batch.refused(&["answers.jsonl, line 1", "another --output"]);
        assert_eq!(fs::read_to_string(batch.output()).unwrap(), text);
    }
    fs::remove_file(batch.output()).unwrap();
    fs::create_dir(batch.output()).unwrap();
    batch.refused(&["cannot write the answers to answers.jsonl"]);
    let output = batch
        .home
        .again()
        .args(["generate", "no-such-model", "--input", "jobs.jsonl"])
        .args(["--output", "./jobs.jsonl"])
        .run();
    output.failed_with(&["both --input and --output"]);
}

#[test]
fn every_field_reaches_its_job() {
    let batch = Batch::new(&[
        json!({"custom_id": "choice", "prompt": "a", "guided_choice": ["yes", "no"]}),
        json!({"custom_id": "regex", "prompt": "a", "guided_regex": "[0-9]{4}"}),
        json!({"custom_id": "grammar", "prompt": "a", "guided_grammar": "start: \"up\"\n"}),
        json!({
            "custom_id": "schema",
            "prompt": "a",
            "max_completion_tokens": 60,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {
                "type": "object",
                "properties": {"ok": {"type": "boolean"}},
                "required": ["ok"],
                "additionalProperties": false
            }}}
        }),
        json!({"custom_id": "ids", "prompt": [1, 9, 10], "stop": null, "max_tokens": 2}),
        json!({"custom_id": "n", "prompt": "a", "n": 2, "temperature": 2, "top_k": 0, "seed": -3}),
        json!({
            "custom_id": "guided",
            "prompt": "hello",
            "negative_prompt": "never",
            "cfg_scale": 1.0,
            "token_healing": false,
            "priority": 3,
            "min_tokens": 4
        }),
        json!({"custom_id": "plain", "prompt": "hello"}),
    ]);
    batch.run(&["--seed", "5"]).succeeded();
    let answers = batch.answers();
    let text = |id: &str| answers[id]["text"].as_str().unwrap();
    assert!(["yes", "no"].contains(&text("choice")));
    assert!(text("regex").parse::<u16>().is_ok() && text("regex").len() == 4);
    assert_eq!(text("grammar"), "up");
    let document: Value = serde_json::from_str(text("schema")).unwrap();
    assert!(document["ok"].is_boolean());
    assert_eq!(ids(&answers["ids"]["prompt_token_ids"]), [1, 9, 10]);
    assert_eq!(ids(&answers["ids"]["token_ids"]).len(), 2);
    let choices = answers["n"]["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert_eq!(text("guided"), text("plain"));
}

#[test]
fn jobs_may_have_priorities() {
    let mut lines = jobs(4);
    lines[2]["priority"] = json!(5);
    let batch = Batch::new(&lines);
    batch.run(&["--batch", "1"]).succeeded();
    // Each answer is waited for by a thread of its own, and those that end close together may be
    // written in either order: the order of submission has a test beside `input::order`.
    let answers = batch.answers();
    let ids: Vec<&str> = answers.keys().map(String::as_str).collect();
    assert_eq!(ids, ["job-0", "job-1", "job-2", "job-3"]);
}

#[test]
fn jobs_may_come_from_standard_input() {
    let batch = Batch::new(&[]);
    let model = tiny("llama");
    batch
        .home
        .again()
        .arg("generate")
        .arg(model)
        .args(["--input", "-", "--output", "answers.jsonl", "-n", "2"])
        .stdin("\u{feff}{\"custom_id\": \"a\", \"prompt\": \"b\"}")
        .run()
        .succeeded();
    assert_eq!(ids(&batch.answers()["a"]["token_ids"]).len(), 2);
}

#[test]
fn more_jobs_than_are_in_flight_are_all_answered() {
    let batch = Batch::new(&jobs(70));
    let model = tiny("llama");
    batch
        .command(model.to_str().unwrap(), &["--batch", "4", "-n", "2"])
        .run()
        .succeeded();
    assert_eq!(batch.answers().len(), 70);
}

#[cfg(unix)]
#[test]
fn control_c_keeps_what_is_complete() {
    // More answers than a pipe holds: the command cannot end before somebody reads on.
    let batch = Batch::new(&jobs(400));
    let model = tiny("llama");
    let output = batch
        .home
        .again()
        .arg("generate")
        .arg(model)
        .args(["--input", "jobs.jsonl", "--output", "/dev/stdout"])
        .args(["--batch", "2", "-n", "40", "--context", "128"])
        .run_interrupted();
    assert_eq!(output.code, 130, "{}", output.stderr);
    assert!(output.stderr.contains("left: the same command goes on"));
    // All but the byte that told that it runs.
    let lines: Vec<Value> = format!("{{{}", output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!((1..400).contains(&lines.len()), "{}", lines.len());
    assert!(
        lines
            .iter()
            .all(|line| line["finish_reason"] != "cancelled")
    );
}
