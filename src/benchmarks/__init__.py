"""How long things take, beside the way others do them: ``make bench``."""
