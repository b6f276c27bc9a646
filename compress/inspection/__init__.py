"""`compress inspect`: what a checkpoint holds, and what each method could make of it."""
