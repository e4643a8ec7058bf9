"""The networks of Würstchen (Pernias et al. 2024, arXiv 2306.00637): Stage A, the semantic compressor, Stage B and Stage C."""
