"""The faults of `mutants.py`: name, file below `nba_lightning/`, text, what takes its place, test files.

A fault that the package must never have again deserves a row here: write it, and run `mutants.py --only NAME`.
"""

# One row a line, however long.
# ruff: noqa: E501
# fmt: off
MUTATIONS: list[tuple[str, str, str, str, str]] = [
    # Adversarial neuron pruning.
    ("anp: alpha swapped", "defenses/anp.py", "self.alpha * clean + (1 - self.alpha) * robust", "(1 - self.alpha) * clean + self.alpha * robust", "defenses/anp"),
    ("anp: descends", "defenses/anp.py", "leaf.detach() + self.epsilon / self.steps", "leaf.detach() - self.epsilon / self.steps", "defenses/anp"),
    ("anp: not projected", "defenses/anp.py", ".clamp(-self.epsilon, self.epsilon)", "", "defenses/anp"),
    ("anp: gradients of one process", "defenses/anp.py", "[self.reduce(gradient) for gradient in torch.autograd.grad(GRADIENT_SCALE * loss, leaves)]", "list(torch.autograd.grad(GRADIENT_SCALE * loss, leaves))", "processes[anp]"),
    ("anp: biases left alone", "defenses/anp.py", "None if xi is None else [1 + one for one in xi]", "None", "defenses/anp"),
    ("anp: the same start in each step", "defenses/anp.py", "generator_for(self.seed, 6, self.trainer.current_epoch, batch_idx,", "generator_for(self.seed, 6, self.trainer.current_epoch,", "defenses/anp"),
    ("anp: masks above 1", "defenses/anp.py", "mask.clamp_(0.0, 1.0)", "mask.clamp_(0.0)", "defenses/anp"),
    ("anp: prunes at the threshold", "defenses/anp.py", "gone = mask < self.threshold", "gone = mask <= self.threshold", "defenses/anp"),
    ("anp: bias of a pruned channel stays", "defenses/anp.py", "norm.bias[gone] = 0.0", "pass", "defenses/anp"),
    ("anp: prunes a step late", "defenses/anp.py", "self.trainer.global_step + 1 == self", "self.trainer.global_step == self", "defenses/anp"),
    ("anp: learns statistics", "defenses/anp.py", "with frozen_statistics(self.model):", "with torch.enable_grad():", "defenses/anp"),
    # Fine-tuning with sharpness-aware minimisation.
    ("ft-sam: not adaptive", "training/sharpness.py", "(rho / norm) * size * w for size", "(rho / norm) * w for size", "defenses/ft_sam"),
    ("ft-sam: no norm", "training/sharpness.py", "(rho / norm)", "rho", "defenses/ft_sam"),
    ("ft-sam: weights stay moved", "training/sharpness.py", "self._set(self._kept)", "pass", "defenses/ft_sam"),
    ("ft-sam: gradients of one process", "training/sharpness.py", "self.reduce(gradient)  #", "gradient  #", "processes[ft_sam]"),
    ("ft-sam: moves down", "training/sharpness.py", "p.detach() + step", "p.detach() - step", "defenses/ft_sam"),
    ("ft-sam: no smoothing in the second pass", "training/sharpness.py", "predict(self.model, images), labels, label_smoothing=self.label_smoothing)", "predict(self.model, images), labels)", "defenses/ft_sam"),
    ("ft-sam: statistics of the second pass", "training/sharpness.py", "with frozen_statistics(self.model):", "with torch.enable_grad():", "defenses/ft_sam"),
    # Implicit backdoor adversarial unlearning.
    ("i-bau: descends", "defenses/i_bau.py", "return leaf.detach() - self.inner_lr", "return leaf.detach() + self.inner_lr", "defenses/i_bau"),
    ("i-bau: no penalty", "defenses/i_bau.py", "return self.penalty * perturbation.square().sum() - F.cross_entropy(", "return -F.cross_entropy(", "defenses/i_bau"),
    ("i-bau: penalty pays", "defenses/i_bau.py", "return self.penalty * perturbation", "return -self.penalty * perturbation", "defenses/i_bau"),
    ("i-bau: the map sees each batch", "defenses/i_bau.py", "perturbation, self.inner_images, self.inner_labels)", "perturbation, images, labels)", "defenses/i_bau"),
    ("i-bau: perturbs all images", "defenses/i_bau.py", "perturbation * chosen[:, None, None, None]", "perturbation", "defenses/i_bau"),
    ("i-bau: goes on from the last round", "defenses/i_bau.py", "torch.zeros_like(first[:1])", "self.perturbation if len(self.perturbation) else torch.zeros_like(first[:1])", "defenses/i_bau"),
    ("i-bau: no source in the fixed point", "defenses/i_bau.py", "vector, retain_graph=True)[0]) + direct_leaf", "vector + direct_leaf, retain_graph=True)[0])", "defenses/i_bau"),
    ("i-bau: an iteration less", "defenses/i_bau.py", "in range(iterations):", "in range(iterations - 1):", "defenses/i_bau"),
    ("i-bau: indirect term alone", "defenses/i_bau.py", "[first + second for first, second", "[second for first, second", "defenses/i_bau"),
    ("i-bau: fixed point of one process", "defenses/i_bau.py", "reduce(torch.autograd.grad(mapped, leaf, vector, retain_graph=True)[0])", "torch.autograd.grad(mapped, leaf, vector, retain_graph=True)[0]", "defenses/i_bau"),
    ("i-bau: slope of one process", "defenses/i_bau.py", "inner_map(leaf), reduce(direct_leaf)", "inner_map(leaf), direct_leaf", "defenses/i_bau"),
    ("i-bau: ascent of one process", "defenses/i_bau.py", "self.reduce(torch.autograd.grad(loss, leaf)[0])", "torch.autograd.grad(loss, leaf)[0]", "defenses/i_bau"),
    # Shared adversarial unlearning.
    ("sau: ascends", "defenses/sau.py", "leaf.detach() - self.step_size", "leaf.detach() + self.step_size", "defenses/sau"),
    ("sau: unlearns in the suspicious network", "defenses/sau.py", "unlearning_loss(predict(self.model, perturbed)", "unlearning_loss(predict(self.suspicious, perturbed)", "defenses/sau"),
    ("sau: asks the network itself", "defenses/sau.py", "answers = predict(self.suspicious, perturbed)", "answers = predict(self.model, perturbed)", "defenses/sau"),
    ("sau: starts at -epsilon", "defenses/sau.py", "torch.full_like(images, self.epsilon)", "torch.full_like(images, -self.epsilon)", "defenses/sau"),
    ("sau: drives answers apart", "defenses/sau.py", "+ self.shared * apart", "- self.shared * apart", "defenses/sau"),
    ("sau: counts images that were wrong before", "defenses/sau.py", "(answers != labels) & (answers != before[1])", "(answers != labels)", "defenses/sau"),
    ("sau: pulls on after the aim", "defenses/sau.py", "* ~done", "* 1.0", "defenses/sau"),
    ("sau: one network's answers before", "defenses/sau.py", "[logits.argmax(dim=1), predict(self.suspicious, images).argmax(dim=1)]", "[logits.argmax(dim=1)] * 2", "defenses/sau"),
    ("sau: learns what it should unlearn", "defenses/sau.py", "(1.0 + 1e-6 - wrong).log()", "wrong.log()", "defenses/sau"),
    # Neural attention distillation.
    ("nad: the student is its own teacher", "defenses/nad.py", "features(self.teacher_network(), images", "features(self.model, images", "defenses/nad"),
    ("nad: power of the student alone", "defenses/nad.py", "attention_map(wanted[name], self.power)", "attention_map(wanted[name])", "defenses/nad"),
    # Fine-pruning.
    ("fine-pruning: the liveliest first", "defenses/fine_pruning.py", "mean(dim=0).argsort()", "mean(dim=0).argsort(descending=True)", "defenses/fine_pruning"),
    ("fine-pruning: signed activations", "defenses/fine_pruning.py", "dormant.abs().mean(dim=0)", "dormant.mean(dim=0)", "defenses/fine_pruning"),
    ("fine-pruning: stops at the bound", "defenses/fine_pruning.py", "accuracy() < start - drop", "accuracy() <= start - drop", "defenses/fine_pruning"),
    ("fine-pruning: goes on behind a dear cut", "defenses/fine_pruning.py", "break", "continue", "defenses/fine_pruning"),
    ("fine-pruning: the dear cut stays", "defenses/fine_pruning.py", "kept[index] = 1.0", "pass", "defenses/fine_pruning"),
    ("fine-pruning: cut weights learn again", "defenses/fine_pruning.py", "super().optimizer_step(*args, **kwargs)\n        self._cut()", "super().optimizer_step(*args, **kwargs)", "defenses/fine_pruning"),
    ("fine-pruning: looks in train mode", "defenses/fine_pruning.py", "with evaluating(self.model), self.trainer", "with self.trainer", "defenses/fine_pruning"),
    ("fine-pruning: decides by training images", "defenses/fine_pruning.py", "features, labels = self._features(held_out)", "self._features(held_out)", "defenses/fine_pruning"),
    ("fine-pruning: ranks by augmented images", "io/batches.py", 'replace(given, stage="evaluate", roles=None)', "given", "defenses/fine_pruning"),
    ("fine-pruning: each process decides for itself", "defenses/fine_pruning.py", "self.all_gather((torch.cat(caught), torch.cat(labels)))", "(torch.cat(caught)[None], torch.cat(labels)[None])", "defenses/fine_pruning"),
    # Pseudo samples.
    ("crafting: KL(S || T)", "pseudo/base.py", "kl_divergence(teacher_logits, student_logits)", "kl_divergence(student_logits, teacher_logits)", "pseudo"),
    ("crafting: student and teacher swapped", "pseudo/base.py", "predict(student, inputs), predict(teacher, inputs)", "predict(teacher, inputs), predict(student, inputs)", "pseudo"),
    ("crafting: not clamped", "pseudo/base.py", "(images + leaf[owner]).clamp(0.0, 1.0)", "(images + leaf[owner])", "pseudo"),
    ("crafting: descends", "pseudo/base.py", "perturbations + step_size * gradients", "perturbations - step_size * gradients", "pseudo"),
    ("crafting: norm over the bank", "pseudo/base.py", "gradients.flatten(1).norm(dim=1)", "gradients.norm().repeat(len(gradients))", "pseudo"),
    ("crafting: steps by the side, not the size", "pseudo/base.py", "math.sqrt(images[0].numel())", "math.sqrt(images[0, 0].numel())", "pseudo"),
    ("crafting: always on the same batch", "pseudo/universal.py", "if step > 0:", "if step < 0:", "pseudo"),
    ("crafting: the first perturbation alone is drawn", "pseudo/universal.py", "torch.randint(self.number,", "torch.randint(1,", "pseudo"),
    ("crafting: the last perturbation is never drawn", "pseudo/universal.py", "torch.randint(self.number,", "torch.randint(max(1, self.number - 1),", "pseudo"),
    ("crafting: bank in train mode", "pseudo/universal.py", "with evaluating(student, teacher):", "with torch.enable_grad():", "pseudo"),
    ("crafting: samples in train mode", "pseudo/sample.py", "with evaluating(student, teacher):", "with torch.enable_grad():", "pseudo"),
    ("crafting: one owner for all", "pseudo/universal.py", "device=images.device) % self.number", "device=images.device) * 0", "pseudo"),
    ("crafting: gradients of one process", "pseudo/universal.py", "reduce(self._gradients(student, teacher, images, self.bank, owner))", "self._gradients(student, teacher, images, self.bank, owner)", "pseudo"),
    ("crafting: never restarts", "pseudo/universal.py", "self.bank.numel() == 0 or self.restart", "self.bank.numel() == 0", "pseudo"),
    ("regeneration: an epoch late", "callbacks/pseudo_samples.py", "self.epochs % self.every_n_epochs == 0", "self.epochs % self.every_n_epochs == 1", "pseudo"),
    ("regeneration: before each step", "callbacks/pseudo_samples.py", "if batch_idx > 0:", "if batch_idx < 0:", "pseudo"),
    # Knowledge forms and divergences.
    ("alignment: summed over layers", "behaviors/base.py", " / len(losses)", "", "behaviors"),
    ("alignment: mean over values", "behaviors/base.py", ".square().sum(dim=1).mean()", ".square().mean()", "behaviors"),
    ("attention: sums over positions", "core/functional.py", ".pow(power).sum(dim=2)", ".pow(power).sum(dim=1)", "functional"),
    ("gram: over samples of a position", "core/functional.py", "unit(tokens.transpose(1, 2) @ tokens)", "unit(tokens @ tokens.transpose(1, 2))", "functional"),
    ("similarity: rows not scaled", "core/functional.py", "unit(flat @ flat.T)", "(flat @ flat.T)", "functional"),
    ("kl: weighted by q", "core/functional.py", "log_p.exp() * (log_p - log_q)).sum", "log_q.exp() * (log_p - log_q)).sum", "functional"),
    ("js: middle not halved", "core/functional.py", "torch.logaddexp(log_p, log_q) - math.log(2.0)", "torch.logaddexp(log_p, log_q)", "functional"),
    ("der: gains of accuracy count", "core/functional.py", "max(0.0, acc_before - acc_after)", "(acc_before - acc_after)", "functional"),
    ("asr: the target's own images count", "core/metrics.py", "(labels != targets) & (labels != IGNORE_LABEL)", "(labels != IGNORE_LABEL)", "metrics"),
    # Modes, draws, schedule.
    ("modes: all layers train behind an evaluation", "core/modes.py", "module.training = training", "module.training = True", "pseudo"),
    ("modes: a frozen network in train mode", "core/modes.py", ".requires_grad_(False).eval()", ".requires_grad_(False)", "defenses/nad defenses/sau"),
    ("draws: the last key alone counts", "core/randomness.py", "(mixed ^ (key & 0xFFFFFFFF))", "(key & 0xFFFFFFFF)", "partition defenses/nba"),
    ("schedule: warm-up a step late", "training/schedule.py", "(step + 1) / (warmup * steps + 1)", "step / (warmup * steps + 1)", "modules"),
    ("sgd: no Nesterov momentum", "training/classifier.py", "nesterov = self.momentum > 0", "nesterov = False", "defenses/fine_tuning"),
    ("mixing: boxes by the share, not its root", "core/augmentation.py", "shares.sqrt() / 2", "shares / 2", "augmentation"),
    # The defender's images.
    ("partition: the first images are the defender's", "data/partition.py", "available[shuffled(len(available), seed, 1, label)][:quota]", "available[:quota]", "partition"),
    ("partition: the first images are poisoned", "data/partition.py", "candidates[shuffled(len(candidates), seed, 0)][:num_poisoned]", "candidates[:num_poisoned]", "partition"),
    ("partition: the defender holds poisoned images", "data/partition.py", "    free[poisoned] = False\n", "", "partition"),
    ("partition: the attacker trains on the held-out part", "data/partition.py", "    training[validation_part] = False\n", "", "partition"),
    ("sampler: all processes see the same images", "data/sampler.py", "order[self.rank :: self.num_replicas]", "order[:: self.num_replicas]", "data"),
]
# fmt: on
