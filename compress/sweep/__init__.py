"""Many runs planned together and compared."""
