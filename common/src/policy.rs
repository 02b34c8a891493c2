//! The policy file: language, compiler and offline tools.
