"""How answers become verdicts: pure functions over answers, without a database and without a provider."""
