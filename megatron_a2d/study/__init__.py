"""Reading runs: reports and, on top of them, studies."""
