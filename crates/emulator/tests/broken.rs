//! What the emulator finds in kernels that are broken, and that it finds nothing in one that is not.

use oxllama_emulator::{Kernel, Launch, Order};

const THREADS: usize = 64;

#[repr(C, align(16))]
struct Numbers([u32; THREADS]);

/// `BrokenArgs` of `broken.cu`, `BrokenClusterArgs` of `broken_cluster.cu` and `BrokenSendsArgs` of `broken_sends.cu`.
#[repr(C)]
struct Args {
    input: *const u32,
    output: *mut u32,
    fault: i32,
    unused: i32,
}

/// What a kernel with this fault makes of squares, by so many blocks of so many threads.
fn run(
    kernel: Kernel,
    fault: i32,
    (blocks, threads): (u32, usize),
    shared_bytes: usize,
    order: Order,
) -> Result<Numbers, String> {
    let input = Numbers(std::array::from_fn(square));
    let mut output = Numbers([0; THREADS]);
    let args = Args {
        input: input.0.as_ptr(),
        output: output.0.as_mut_ptr(),
        fault,
        unused: 0,
    };
    let launch = Launch {
        grid: [blocks, 1, 1],
        block: [threads as u32, 1, 1],
        shared_bytes,
        order,
    };
    let bytes = (&raw const args).cast::<u8>();
    // SAFETY: the structure is the kernel's and names both arrays; this file has one test, which
    // runs kernels one after the other.
    unsafe {
        let bytes = std::slice::from_raw_parts(bytes, size_of::<Args>());
        kernel.run(launch, bytes)?;
    }
    Ok(output)
}

fn square(i: usize) -> u32 {
    (i * i) as u32
}

/// Whether the kernel gives what it should.
fn is_right(fault: i32, order: Order) -> Result<bool, String> {
    let kernel = Kernel::find(c"oxl_broken").expect("a kernel of the tests");
    let output = run(kernel, fault, (1, THREADS), 512, order)?;
    let expected = |i: usize| square((i + 1) % THREADS) + square((i + THREADS - 1) % THREADS);
    Ok((0..THREADS).all(|i| output.0[i] == expected(i)))
}

/// Whether a cluster gives what it should.
fn cluster_is_right(fault: i32, order: Order) -> Result<bool, String> {
    const NUMBERS: usize = THREADS / 2;
    let kernel = Kernel::find(c"oxl_broken_cluster").expect("a kernel of the tests");
    assert!(kernel.is_hoppers());
    let output = run(kernel, fault, (2, NUMBERS), 128, order)?;
    let expected = |i: usize| square(NUMBERS - 1 - i % NUMBERS);
    Ok((0..THREADS).all(|i| output.0[i] == expected(i)))
}

/// Whether blocks that send each other numbers give what they should.
fn sends_are_right(fault: i32, order: Order) -> Result<bool, String> {
    let kernel = Kernel::find(c"oxl_broken_sends").expect("a kernel of the tests");
    assert_eq!(kernel.ctas(), 4);
    let output = run(kernel, fault, (4, 32), 80, order)?;
    let expected = |i: usize| square((i + THREADS / 2) % THREADS);
    Ok((0..THREADS).all(|i| output.0[i] == expected(i)))
}

#[test]
fn what_is_broken_is_found() {
    for order in [Order::Forward, Order::Backward] {
        assert_eq!(is_right(0, order), Ok(true), "{order:?}");
        assert_eq!(is_right(1, order), Ok(false), "{order:?}: no barrier");
        assert_eq!(is_right(2, order), Ok(false), "{order:?}: no wait");
        let apart = is_right(3, order).expect_err("a warp that comes apart");
        assert!(apart.contains("came apart"), "{apart}");
        // It runs on after that.
        assert_eq!(is_right(0, order), Ok(true), "{order:?}");

        assert_eq!(cluster_is_right(0, order), Ok(true), "{order:?}");
        assert_eq!(cluster_is_right(1, order), Ok(false), "{order:?}: no wait");
        let endless = cluster_is_right(2, order).expect_err("a wait without an end");
        assert!(endless.contains("wait for each other"), "{endless}");
        assert_eq!(cluster_is_right(0, order), Ok(true), "{order:?}");

        assert_eq!(sends_are_right(0, order), Ok(true), "{order:?}");
        assert_eq!(sends_are_right(1, order), Ok(false), "{order:?}: no wait");
    }
    // What is sent too early is there too early.
    assert_eq!(sends_are_right(2, Order::Backward), Ok(false));
    assert!(Kernel::find(c"oxl_linear_many").is_none());
    let is_hoppers = |name| Kernel::find(name).map(|kernel| kernel.is_hoppers());
    assert_eq!(is_hoppers(c"oxl_linear_many_256"), Some(true));
    assert_eq!(is_hoppers(c"oxl_linear_few"), Some(false));
}
