"""From documents to packed rows and prompts: sources → tokenizer → store → corpus → prepare → rows, prompts, bigram."""
