"""What is measured and where it goes: events from the roles, names, the time ledger, sinks, the console."""
