//! What a misspelt name may have meant.

/// Names longer than this are no slips.
const LONGEST_BYTES: usize = 64;

/// Names that are proposed at most.
const MOST: usize = 4;

/// Of the `known` names, those that differ from `name` by few letters, contain it or are
/// contained in it, the nearest first.
pub fn near_names<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Vec<&'n str> {
    if name.len() > LONGEST_BYTES {
        return Vec::new();
    }
    let name = name.to_ascii_lowercase();
    let mut near: Vec<(usize, &str)> = known
        .into_iter()
        .filter_map(|known| {
            let distance = edit_distance(&name, known);
            let is_part =
                name.len().min(known.len()) >= 3 && (known.contains(&name) || name.contains(known));
            (distance <= known.len() / 3 || is_part).then_some((distance, known))
        })
        .collect();
    near.sort_unstable();
    near.truncate(MOST);
    near.into_iter().map(|(_, known)| known).collect()
}

/// How many letters must be inserted, removed or replaced (Levenshtein).
fn edit_distance(from: &str, to: &str) -> usize {
    let to = to.as_bytes();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (index, letter) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (place, other) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *other);
            diagonal = row[place + 1];
            row[place + 1] = replaced.min(row[place] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_letters() {
        let distances = [
            ("", "abc", 3),
            ("abc", "abc", 0),
            ("abd", "abc", 1),
            ("ac", "abc", 1),
        ];
        for (from, to, distance) in distances {
            assert_eq!(edit_distance(from, to), distance);
            assert_eq!(edit_distance(to, from), distance);
        }
    }
}
