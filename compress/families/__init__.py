"""What methods share: the base class of compressors, quantisers, pruners, factorisations and corrections,."""
