"""SuperGLUE (Wang et al. 2019): its eight tasks from the official files, their metrics, and its submission format."""
