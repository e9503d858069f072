"""What a person sees in the terminal: progress bars, one-line errors, and the live denoising view."""
