//! Inventory of devices, byte ledger and planner.
