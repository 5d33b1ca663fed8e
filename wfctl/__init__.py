"""The stateless client: it asks the daemon, and reads the event log when no daemon answers."""
