"""Terminal output: progress bars, one-line errors, and the live denoising view."""
