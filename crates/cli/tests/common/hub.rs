//! A small HTTP server on this machine that imitates a Hugging Face hub and its storage.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// The commit of `main`, and of the branch `4.0bpw`.
pub(crate) const MAIN: &str = "1111111111111111111111111111111111111111";
pub(crate) const BRANCH: &str = "4444444444444444444444444444444444444444";

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| &**value)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    /// Close the connection after this many bytes of the body.
    pub(crate) cut_after: Option<usize>,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            cut_after: None,
        }
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// A server and what it was asked so far.
pub(crate) struct Server {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers each request with what `handler` makes of it, for as long as the test runs.
    pub(crate) fn start(handler: impl Fn(&Request) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away is part of some tests.
                let _ = serve(&stream, |request| {
                    seen.lock().expect("no panics").push(request.clone());
                    handler(request)
                });
            }
        });
        Self { url, requests }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no panics").clone()
    }
}

fn serve(stream: &TcpStream, answer: impl Fn(&Request) -> Reply) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Ok(());
    };
    let mut headers = Vec::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let request = Request {
        method,
        path,
        headers,
    };
    let reply = answer(&request);
    let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", reply.status);
    if !reply
        .headers
        .iter()
        .any(|(name, _)| *name == "Content-Length")
    {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let mut stream = stream;
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method != "HEAD" {
        let end = reply
            .cut_after
            .unwrap_or(reply.body.len())
            .min(reply.body.len());
        stream.write_all(&reply.body[..end])?;
    }
    stream.flush()
}

pub(crate) fn sha256(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// `content`, or the part of it that the request's Range asks for.
pub(crate) fn ranged(request: &Request, content: &[u8]) -> Reply {
    let from = request
        .header("Range")
        .and_then(|range| range.strip_prefix("bytes="));
    match from.and_then(|range| range.strip_suffix('-')?.parse::<usize>().ok()) {
        Some(from) => Reply::new(206, &content[from..]).with(
            "Content-Range",
            format!("bytes {from}-{}/{}", content.len() - 1, content.len()),
        ),
        None => Reply::new(200, content),
    }
}

/// The model `org/tiny`: its files, and the storage that large ones are redirected to.
#[derive(Clone)]
pub(crate) struct Hub {
    pub(crate) files: Vec<(String, Vec<u8>)>,
    pub(crate) storage: Option<String>,
}

impl Hub {
    pub(crate) fn new(files: &[(&str, &[u8])]) -> Self {
        let files = files
            .iter()
            .map(|(name, content)| ((*name).to_owned(), content.to_vec()));
        Self {
            files: files.collect(),
            storage: None,
        }
    }

    pub(crate) fn answer(&self, request: &Request) -> Reply {
        let path = &*request.path;
        match path {
            "/api/models/org/tiny/revision/main" => self.listing(MAIN),
            "/api/models/org/tiny/revision/4.0bpw" => self.listing(BRANCH),
            "/api/models/org/tiny/refs" => Reply::new(
                200,
                r#"{"branches": [{"name": "main"}, {"name": "4.0bpw"}, {"name": "3.0bpw"},
                   {"name": "a\u001b[2Jb"}], "tags": []}"#,
            ),
            _ if path.starts_with("/api/models/org/tiny/revision/") => {
                Reply::new(404, "").with("X-Error-Code", "RevisionNotFound")
            }
            _ => self.file(request),
        }
    }

    fn listing(&self, commit: &str) -> Reply {
        let siblings = self
            .files
            .iter()
            .map(|(name, _)| serde_json::json!({"rfilename": name}));
        let siblings: Vec<_> = siblings.collect();
        let answer = serde_json::json!({"id": "org/tiny", "sha": commit, "siblings": siblings});
        Reply::new(200, answer.to_string())
    }

    fn file(&self, request: &Request) -> Reply {
        let name = [MAIN, BRANCH].iter().find_map(|commit| {
            request
                .path
                .strip_prefix(&format!("/org/tiny/resolve/{commit}/"))
        });
        let found = self.files.iter().find(|(file, _)| Some(&**file) == name);
        let Some((name, content)) = found else {
            return Reply::new(404, "");
        };
        match &self.storage {
            Some(storage) if name.ends_with(".safetensors") => {
                Reply::new(302, "Found. Redirecting")
                    .with("Location", format!("{storage}/{name}?signature=x"))
                    .with("X-Linked-Etag", format!("\"{}\"", sha256(content)))
                    .with("X-Linked-Size", content.len().to_string())
                    .with("X-Repo-Commit", MAIN)
            }
            // A small file's etag is its git id: 40 digits.
            _ => ranged(request, content).with("ETag", format!("\"{}\"", &sha256(content)[..40])),
        }
    }
}
