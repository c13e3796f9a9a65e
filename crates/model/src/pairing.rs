//! Whether one model can guess ahead for another, told before either is loaded.
//!
//! A wrong draft model never makes a wrong answer: every guess is checked against the target. It
//! makes a slow one, for reasons that are hard to see from outside. All that can be known from
//! files is said here.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;

use oxllama_format::{FormatError, ModelSource, TensorSource};
use oxllama_memory::Bytes;
use oxllama_text::Tokenizer;

use crate::plan::model_name;
use crate::{ModelError, ModelSpec, inspect};

/// A draft that reads more than this share of its target's bytes a step is warned of.
///
/// With `r` for the share, `k` guesses cost `k · r` steps of the target and give at most `k + 1`
/// tokens for `1 + k · r` steps: at one half and four guesses, of which each is right four times
/// in five, 3.4 tokens for the time of 3.
const LARGEST_USEFUL_SHARE: f64 = 0.5;

/// Places at which two tensors are compared, and bytes compared at each.
const SAMPLES: usize = 4;
const SAMPLE_BYTES: usize = 1024;

/// One of the two models that are to work together.
#[derive(Clone, Copy)]
pub struct PairedModel<'a> {
    /// Its files.
    pub source: &'a ModelSource,
    /// What it is.
    pub spec: &'a ModelSpec,
    /// Its vocabulary.
    pub tokenizer: &'a Tokenizer,
}

/// A token that two vocabularies have under one id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenDifference {
    /// The id.
    pub id: u32,
    /// The token as the target's vocabulary writes it.
    pub target: String,
    /// The token as the draft's vocabulary writes it.
    pub draft: String,
}

/// Why a model cannot guess ahead for another.
#[derive(Debug, thiserror::Error)]
pub enum DraftError {
    /// Both are the same files.
    #[error(
        "the draft model is its own target: both are {}; a draft must be much smaller to be of \
         use: take a smaller model of the same family, or guess from n-grams instead",
        path.display()
    )]
    SameFiles {
        /// A file of both, links resolved.
        path: PathBuf,
    },

    /// One is a copy of the other.
    #[error(
        "the draft model {} is a copy of its target {}: every tensor has the same shape and, \
         wherever they were compared, the same bytes; take a smaller model of the same family, \
         or guess from n-grams instead",
        draft.display(),
        target.display()
    )]
    SameWeights {
        /// The target's directory or file.
        target: PathBuf,
        /// The draft's directory or file.
        draft: PathBuf,
    },

    /// The same ids stand for other tokens.
    #[error(
        "the draft model {name} has another vocabulary than its target: {differing} of the \
         {compared} token ids that both use stand for other text, the first {} for {:?} in the \
         target and {:?} in the draft; take a smaller model of the target's own family, or guess \
         from n-grams instead",
        first.id,
        first.target,
        first.draft
    )]
    OtherVocabulary {
        /// The draft.
        name: String,
        /// The lowest id that differs and is not special in both.
        first: TokenDifference,
        /// Ids that differ.
        differing: usize,
        /// Ids that both vocabularies use.
        compared: usize,
    },

    /// The draft has no embedding for some of the target's tokens.
    #[error(
        "the draft model {name} knows token ids below {found} only, but its target writes ids up \
         to {}: take a smaller model of the target's own family, or guess from n-grams instead",
        expected.saturating_sub(1)
    )]
    MissingTokens {
        /// The draft.
        name: String,
        /// Tokens of the draft.
        found: usize,
        /// Tokens that the target may write.
        expected: usize,
    },

    /// The files of one of the two are malformed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<FormatError> for DraftError {
    fn from(error: FormatError) -> Self {
        Self::Model(error.into())
    }
}

/// Why a model that can guess ahead for another is unlikely to make it faster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DraftWarning {
    /// A guess costs more than what it saves.
    #[error(
        "the draft model {name} is larger than its target: a step reads {draft} of it and \
         {target} of the target, so guessing can only cost time; exchange the two if they are \
         mixed up, or take a smaller model of the same family"
    )]
    Larger {
        /// The draft.
        name: String,
        /// Bytes that a step of the draft reads.
        draft: Bytes,
        /// Bytes that a step of the target reads.
        target: Bytes,
    },

    /// A guess costs about as much as what it saves.
    #[error(
        "the draft model {name} is not much smaller than its target: a step reads {draft} of it \
         and {target} of the target, and drafts above half the size rarely pay; take a smaller \
         model of the same family, or one of fewer bits per weight"
    )]
    NotMuchSmaller {
        /// The draft.
        name: String,
        /// Bytes that a step of the draft reads.
        draft: Bytes,
        /// Bytes that a step of the target reads.
        target: Bytes,
    },

    /// Special tokens have other names; everything else is the same.
    #[error(
        "the draft model {name} uses {differing} special tokens differently than its target, the \
         first {} as {:?} for {:?}: guesses around them will be wrong; a draft of the target's \
         own version would guess them",
        first.id,
        first.draft,
        first.target
    )]
    OtherSpecialTokens {
        /// The draft.
        name: String,
        /// The lowest id that differs.
        first: TokenDifference,
        /// Ids that differ.
        differing: usize,
    },

    /// The two end their texts differently, as base and chat models do.
    #[error(
        "the draft model {name} ends a text with the tokens {draft:?}, its target with \
         {target:?}: one of them may be a base and the other a chat model; a draft tuned as the \
         target is would guess better"
    )]
    OtherEndTokens {
        /// The draft.
        name: String,
        /// Ids that end the draft's texts.
        draft: Vec<u32>,
        /// Ids that end the target's texts.
        target: Vec<u32>,
    },

    /// The target is a chat model, the draft is not.
    #[error(
        "the draft model {name} has no chat template and its target has one: it is probably a \
         base model and will guess badly in conversations; a draft tuned for chat would guess \
         better"
    )]
    NoChatTemplate {
        /// The draft.
        name: String,
    },
}

/// Says whether `draft` can guess ahead for `target`, and what speaks against it.
///
/// Reads headers and vocabularies; of weights, a few KiB a tensor, and only while the two
/// models have been found equal so far.
///
/// # Errors
/// The two are the same model, or the draft's vocabulary is another; or the files of one are
/// malformed.
pub fn diagnose_draft(
    target: PairedModel<'_>,
    draft: PairedModel<'_>,
) -> Result<Vec<DraftWarning>, DraftError> {
    let sizes = compare_sizes(target, draft)?;
    check_identity(target.source, draft.source)?;
    let warnings = [
        sizes,
        compare_vocabularies(target, draft)?,
        compare_ends(target, draft),
        compare_templates(target, draft),
    ];
    Ok(warnings.into_iter().flatten().collect())
}

/// Refuses a draft that is its own target.
fn check_identity(target: &ModelSource, draft: &ModelSource) -> Result<(), DraftError> {
    let files = tensor_files(target);
    if files == tensor_files(draft) {
        let path = files.into_iter().next();
        return Err(DraftError::SameFiles {
            path: path.unwrap_or_else(|| target.path().to_path_buf()),
        });
    }
    if have_same_weights(target.tensors(), draft.tensors())? {
        return Err(DraftError::SameWeights {
            target: target.path().to_path_buf(),
            draft: draft.path().to_path_buf(),
        });
    }
    Ok(())
}

/// The files that hold a model's tensors, links resolved.
fn tensor_files(source: &ModelSource) -> BTreeSet<PathBuf> {
    let tensors = source.tensors();
    let files: BTreeSet<_> = tensors
        .infos()
        .map(|info| tensors.file_of(&info.name))
        .collect();
    let resolve = |file: &std::path::Path| file.canonicalize().unwrap_or_else(|_| file.into());
    files.into_iter().map(resolve).collect()
}

/// Whether two models have the same tensors as far as headers and samples tell. Models that
/// differ do so almost at once; only a copy is read everywhere.
fn have_same_weights(
    target: &dyn TensorSource,
    draft: &dyn TensorSource,
) -> Result<bool, FormatError> {
    if !target.infos().eq(draft.infos()) {
        return Ok(false);
    }
    for info in target.infos() {
        let ours = target.read_stored(&info.name)?;
        let theirs = draft.read_stored(&info.name)?;
        let same = ours.len() == theirs.len()
            && samples(ours.len()).all(|range| ours[range.clone()] == theirs[range]);
        if !same {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where `bytes` are sampled: all of a few KiB; of more, some at the start, the end and between.
fn samples(bytes: usize) -> impl Iterator<Item = Range<usize>> {
    let last = bytes.saturating_sub(SAMPLE_BYTES);
    (0..SAMPLES).map(move |sample| {
        let begin = (last as u128 * sample as u128 / (SAMPLES - 1) as u128) as usize;
        begin..bytes.min(begin + SAMPLE_BYTES)
    })
}

fn compare_sizes(
    target: PairedModel<'_>,
    draft: PairedModel<'_>,
) -> Result<Option<DraftWarning>, DraftError> {
    let step_bytes = |model: PairedModel<'_>| {
        inspect(model.source, model.spec).map(|found| found.bytes_per_token)
    };
    let (target_bytes, draft_bytes) = (step_bytes(target)?, step_bytes(draft)?);
    let name = model_name(draft.source);
    let (draft, target) = (Bytes(draft_bytes), Bytes(target_bytes));
    Ok(if draft_bytes > target_bytes {
        Some(DraftWarning::Larger {
            name,
            draft,
            target,
        })
    } else if draft_bytes as f64 > LARGEST_USEFUL_SHARE * target_bytes as f64 {
        Some(DraftWarning::NotMuchSmaller {
            name,
            draft,
            target,
        })
    } else {
        None
    })
}

/// Compares what ids stand for, where both vocabularies use them: one may have more tokens than
/// the other at its end, or holes. Special tokens may have other names, as they do between
/// versions of a family.
fn compare_vocabularies(
    target: PairedModel<'_>,
    draft: PairedModel<'_>,
) -> Result<Option<DraftWarning>, DraftError> {
    let name = model_name(draft.source);
    let written = target.tokenizer.vocab_size().min(target.spec.vocab_size);
    let known = draft.tokenizer.vocab_size().min(draft.spec.vocab_size);
    let (mut compared, mut differing, mut all_special) = (0, 0, true);
    let mut first: Option<TokenDifference> = None;
    for id in 0..written.min(known) as u32 {
        let texts = target.tokenizer.token_text(id);
        let Some((ours, theirs)) = texts.zip(draft.tokenizer.token_text(id)) else {
            continue;
        };
        compared += 1;
        if ours == theirs {
            continue;
        }
        let special = target.tokenizer.is_special(id) && draft.tokenizer.is_special(id);
        differing += 1;
        // A difference in text weighs more than one in names.
        if first.is_none() || (all_special && !special) {
            first = Some(TokenDifference {
                id,
                target: ours,
                draft: theirs,
            });
        }
        all_special &= special;
    }
    match first {
        Some(first) if !all_special => Err(DraftError::OtherVocabulary {
            name,
            first,
            differing,
            compared,
        }),
        _ if written > draft.spec.vocab_size => Err(DraftError::MissingTokens {
            name,
            found: draft.spec.vocab_size,
            expected: written,
        }),
        Some(first) => Ok(Some(DraftWarning::OtherSpecialTokens {
            name,
            first,
            differing,
        })),
        None => Ok(None),
    }
}

fn compare_ends(target: PairedModel<'_>, draft: PairedModel<'_>) -> Option<DraftWarning> {
    let (ours, theirs) = (target.tokenizer.eos_ids(), draft.tokenizer.eos_ids());
    (ours != theirs).then(|| DraftWarning::OtherEndTokens {
        name: model_name(draft.source),
        draft: theirs.to_vec(),
        target: ours.to_vec(),
    })
}

fn compare_templates(target: PairedModel<'_>, draft: PairedModel<'_>) -> Option<DraftWarning> {
    let has_template = |model: PairedModel<'_>| {
        let config = model.source.tokenizer_config();
        config.is_some_and(|config| !config["chat_template"].is_null())
    };
    (has_template(target) && !has_template(draft)).then(|| DraftWarning::NoChatTemplate {
        name: model_name(draft.source),
    })
}
