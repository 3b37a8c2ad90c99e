"""A fresh or loaded model, LoRA and QLoRA, the fused head, attention of packed documents."""
