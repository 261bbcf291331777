import setting
from torchattacks import AutoAttack

model, images, labels = setting.load()
moved = AutoAttack(model, norm="Linf", eps=0.15, version="standard", n_classes=10)(images, labels)
clean = model(images).argmax(1) == labels
robust = model(moved).argmax(1) == labels
print(clean.float().mean().item(), (clean & robust).float().mean().item())
