import setting
from pyautoattack import AutoAttack

model, images, labels = setting.load()
attack = AutoAttack(model, norm="Linf", eps=0.15, version="standard")
moved, _ = attack.run_standard_evaluation(images, labels)
clean = model(images).argmax(1) == labels
robust = model(moved).argmax(1) == labels
print(clean.float().mean().item(), (clean & robust).float().mean().item())
