"""From a configuration to a job."""
