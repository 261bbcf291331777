import setting
from foolbox import PyTorchModel
from foolbox.attacks import LinfPGD

model, images, labels = setting.load()
wrapped = PyTorchModel(model, bounds=(0, 1))
attack = LinfPGD(abs_stepsize=0.015, steps=20, random_start=True)
_, _, fooled = attack(wrapped, images, labels, epsilons=0.15)
clean = model(images).argmax(1) == labels
print(clean.float().mean().item(), (clean & ~fooled).float().mean().item())
