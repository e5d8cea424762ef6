"""Fine-tune and run models several times larger than memory on one workstation."""
