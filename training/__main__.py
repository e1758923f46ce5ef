"""`python -m training` is `trm-train`, in the form that torchrun and accelerate launch."""

from training.cli import train

if __name__ == "__main__":
    train()
