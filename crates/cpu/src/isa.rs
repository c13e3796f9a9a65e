//! Which instruction set the kernels use, found at run time.

/// A level of instructions for which every kernel is compiled.
///
/// Levels are ordered: a machine that has one has all before it. Integer products are exact
/// and fp32 steps come in one order on every level; only [`Isa::Portable`] rounds the product
/// of a multiply-add, so its results may differ in the last bits from the others'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// What the compiler makes of plain Rust.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512,
    /// [`Isa::Avx512`] with the dot-product instructions of VNNI.
    Avx512Vnni,
}

/// Caps the level: `portable`, `avx2` or `avx512`. Other values are ignored. For tests and for
/// measuring; the levels differ in speed only.
pub const ISA_VARIABLE: &str = "OXLLAMA_CPU_ISA";

impl Isa {
    /// Every level, lowest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Vnni];

    /// The highest level that this machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            if avx512 && is_x86_feature_detected!("avx512vnni") {
                return Self::Avx512Vnni;
            }
            if avx512 {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// The highest level that this machine has and [`ISA_VARIABLE`] allows.
    pub fn select() -> Self {
        let cap = std::env::var(ISA_VARIABLE).ok();
        Self::detect().min(Self::cap_named(cap.as_deref()))
    }

    /// The cap that a value of [`ISA_VARIABLE`] stands for.
    fn cap_named(name: Option<&str>) -> Self {
        match name {
            Some("portable") => Self::Portable,
            Some("avx2") => Self::Avx2,
            _ => Self::Avx512Vnni,
        }
    }

    /// The levels that this machine has, lowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        let highest = Self::detect();
        Self::ALL.into_iter().filter(move |&isa| isa <= highest)
    }

    /// Lower-case name, as in [`ISA_VARIABLE`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512-vnni",
        }
    }
}

/// Compiles a generic kernel once for every [`Isa`] and picks one by its first argument.
///
/// `fn name(isa, arguments…) = generic::path;` where `generic::path` is an `#[inline(always)]`
/// unsafe function over `S: Simd`: inlined into a function that enables the level's features,
/// its vector operations become single instructions.
macro_rules! per_isa {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?
        = $($generic:ident)::+ $(<$($extra:tt),*>)?;) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name(isa: crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: this function's caller holds the kernel's contract, and the
                // features are enabled here.
                unsafe { $($generic)::+::<crate::simd::Avx2 $($(, $extra)*)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as above.
                unsafe {
                    $($generic)::+::<crate::simd::Avx512<false> $($(, $extra)*)?>($($arg),*)
                }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(
                enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
            )]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512_vnni($($arg: $ty),*) $(-> $ret)? {
                // SAFETY: as above.
                unsafe {
                    $($generic)::+::<crate::simd::Avx512<true> $($(, $extra)*)?>($($arg),*)
                }
            }
            // SAFETY: the caller holds the kernel's contract; a level above portable is only
            // ever chosen after its features were detected.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    crate::Isa::Avx2 => avx2($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    crate::Isa::Avx512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    crate::Isa::Avx512Vnni => avx512_vnni($($arg),*),
                    _ => $($generic)::+::<crate::simd::Portable $($(, $extra)*)?>($($arg),*),
                }
            }
        }
    };
}

pub(crate) use per_isa;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_are_read_by_name() {
        assert_eq!(Isa::cap_named(Some("portable")), Isa::Portable);
        assert_eq!(Isa::cap_named(Some("avx2")), Isa::Avx2);
        assert_eq!(Isa::cap_named(Some("avx512")), Isa::Avx512Vnni);
        assert_eq!(Isa::cap_named(None), Isa::Avx512Vnni);
    }

    #[test]
    fn portable_is_always_available() {
        assert_eq!(Isa::available().next(), Some(Isa::Portable));
    }
}
