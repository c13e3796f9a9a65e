//! What ptxas says of each function with `-v`.

/// What one function takes on one architecture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FunctionReport {
    /// The kernel, or a device function that was not inlined.
    pub name: String,
    /// Whether it is a kernel: only kernels have registers and shared memory of their own.
    pub is_kernel: bool,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of shared memory a block that are fixed in the source.
    pub shared_bytes: u32,
    /// Bytes of local memory a thread: spilled registers, and arrays that are in none.
    pub stack_bytes: u32,
    /// Bytes of registers that were stored to local memory for want of room.
    pub spill_store_bytes: u32,
    /// Bytes of them that were loaded again.
    pub spill_load_bytes: u32,
}

/// Reads the functions in what `ptxas -v` printed, in its order; lines that say something else
/// are passed over.
pub fn parse_report(output: &str) -> Vec<FunctionReport> {
    let mut functions: Vec<FunctionReport> = Vec::new();
    for line in output.lines() {
        let message = line
            .strip_prefix("ptxas info")
            .and_then(|rest| rest.trim_start().strip_prefix(':'))
            .map_or(line, str::trim);
        if let Some(rest) = message.strip_prefix("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default();
            functions.push(FunctionReport {
                name: name.to_owned(),
                is_kernel: true,
                ..FunctionReport::default()
            });
        } else if let Some(name) = message.strip_prefix("Function properties for ") {
            // A kernel was announced by the line above; any other function begins here.
            if functions
                .last()
                .is_none_or(|function| function.name != name)
            {
                functions.push(FunctionReport {
                    name: name.to_owned(),
                    ..FunctionReport::default()
                });
            }
        } else if let Some(function) = functions.last_mut() {
            if message.contains("bytes stack frame") {
                function.stack_bytes = number_before(message, "bytes stack frame");
                function.spill_store_bytes = number_before(message, "bytes spill stores");
                function.spill_load_bytes = number_before(message, "bytes spill loads");
            } else if message.starts_with("Used ") {
                // Said of kernels only, before the functions that they call are listed.
                function.registers = number_before(message, "registers");
                function.shared_bytes = number_before(message, "bytes smem");
            }
        }
    }
    functions
}

/// The number before `unit` in a list as `Used 40 registers, 1024 bytes smem`; 0 if it is not there.
fn number_before(message: &str, unit: &str) -> u32 {
    let before = message.split(unit).next().unwrap_or_default();
    if before.len() == message.len() {
        return 0;
    }
    let number = before.split_whitespace().next_back();
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As nvcc 13.0 prints it.
    const OUTPUT: &str = "\
ptxas warning : Local memory used for function 'oxl_b', size of stack frame: 48 bytes
ptxas info    : 272 bytes gmem, 16 bytes cmem[4]
ptxas info    : Compiling entry function 'oxl_b' for 'sm_80'
ptxas info    : Function properties for oxl_b
    48 bytes stack frame, 1152 bytes spill stores, 1176 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers, 48 bytes cumulative stack size, 364 bytes cmem[0]
ptxas info    : Compile time = 22.133 ms
ptxas info    : Function properties for _Z1gf
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'oxl_a' for 'sm_80'
ptxas info    : Function properties for oxl_a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 1 barriers, 256 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 4.267 ms
";

    #[test]
    fn kernels_and_helpers_are_told_apart() {
        let functions = parse_report(OUTPUT);
        let expected = [
            FunctionReport {
                name: "oxl_b".to_owned(),
                is_kernel: true,
                registers: 26,
                shared_bytes: 0,
                stack_bytes: 48,
                spill_store_bytes: 1152,
                spill_load_bytes: 1176,
            },
            FunctionReport {
                name: "_Z1gf".to_owned(),
                stack_bytes: 8,
                ..FunctionReport::default()
            },
            FunctionReport {
                name: "oxl_a".to_owned(),
                is_kernel: true,
                registers: 16,
                shared_bytes: 256,
                ..FunctionReport::default()
            },
        ];
        assert_eq!(functions, expected);
    }

    #[test]
    fn other_output_reports_nothing() {
        assert_eq!(parse_report(""), []);
        assert_eq!(
            parse_report("step.cu(3): error: expected a \";\"\nUsed 3 registers\n"),
            []
        );
    }
}
