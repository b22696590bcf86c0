"""What `status`, `logs` and `compare` show."""
