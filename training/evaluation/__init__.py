"""trm-eval: what a decoder is worth next to its backbone and to controls, on problems that training has not seen."""
