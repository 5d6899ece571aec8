"""What users do with texts: load a model, remember, ask, explain, rank, generate."""
