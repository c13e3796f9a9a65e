//! Model families as data, the one decoder, loading by plan.
