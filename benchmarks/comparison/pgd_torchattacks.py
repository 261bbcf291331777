import setting
from torchattacks import PGD

model, images, labels = setting.load()
moved = PGD(model, eps=0.15, alpha=0.015, steps=20, random_start=True)(images, labels)
clean = model(images).argmax(1) == labels
robust = model(moved).argmax(1) == labels
print(clean.float().mean().item(), (clean & robust).float().mean().item())
