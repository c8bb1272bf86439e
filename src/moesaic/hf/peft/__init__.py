"""Fine-tune chosen experts of any mixture: with LoRA through PEFT, or their weights alone; and see that they train."""
