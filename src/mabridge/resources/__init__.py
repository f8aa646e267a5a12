"""What is put into a session's sandbox before its first call."""
