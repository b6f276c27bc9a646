"""MLX: the folder that mlx-lm loads on Apple's machines, and on a CPU."""
