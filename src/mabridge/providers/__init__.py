"""The providers that come with mabridge, one file each."""
