"""Publishing on the Hugging Face hub: the files of one export, and their upload into a repository of their own."""
