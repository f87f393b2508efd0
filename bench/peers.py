"""The step as others write it: the same R runs, the same AdamW and clamp, on the concatenated input `[E[a]; E[b]]`.

Each peer is a class with `steps(k)`, which advances all R runs by k steps, and `weights(i)`, run i's `E, W1, W2, b1, b2` for the agreement
test. All hold the norm at `target` after every step, as the clamped cells do, and take the labels' cross-entropy at tau = 1.
"""
import importlib.util
import math

import torch
import torch.nn.functional as F

BETAS, EPS = (0.9, 0.999), 1e-8


class EagerAutograd:
    """How the released runners work: batched leaf tensors, all p*p pairs forward and backward with the test pairs masked out of the loss,
    autograd, AdamW tensor by tensor."""
    name, n_weights = "eager_autograd", 3

    def __init__(self, weights: list, a: torch.Tensor, b: torch.Tensor, p: int, target: float, lr: float, weight_decay: float):
        self.parameters = [w.clone().requires_grad_() for w in weights]                  # E (R, p, d), W1, W2, b1 (R, 1, H), b2
        self.target, R = target, len(a)
        self.take_pairs(a, b, p)
        self.run = torch.arange(R, device=a.device)[:, None]
        self.optimizer = torch.optim.AdamW([{"params": self.parameters[: self.n_weights], "weight_decay": weight_decay},
                                            {"params": self.parameters[self.n_weights:], "weight_decay": 0.0}], lr=lr, betas=BETAS, eps=EPS)

    def take_pairs(self, a: torch.Tensor, b: torch.Tensor, p: int) -> None:
        pair = torch.arange(p * p, device=a.device).expand(len(a), -1)                   # (R, p*p)
        share = torch.zeros(pair.shape, device=a.device).scatter_(1, a * p + b, 1 / a.shape[1])
        self.a, self.b, self.labels, self.share = pair // p, pair % p, (pair // p + pair % p) % p, share

    def loss(self) -> torch.Tensor:
        E, W1, W2, b1, b2 = self.parameters
        x = torch.cat([E[self.run, self.a], E[self.run, self.b]], dim=-1)                # (R, pairs, 2d)
        z = F.gelu(torch.baddbmm(b1, x, W1)) @ W2 + b2                                   # (R, pairs, p)
        each = F.cross_entropy(z.flatten(0, 1), self.labels.flatten(), reduction="none").view(self.labels.shape)
        return (each * self.share).sum()

    def steps(self, k: int) -> None:
        for _ in range(k):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            self.optimizer.step()
            self.clamp()

    @torch.no_grad()
    def clamp(self) -> None:
        squared = sum(w.flatten(1).square().sum(1) for w in self.parameters[: self.n_weights])      # (R,)
        for w in self.parameters[: self.n_weights]:
            w.mul_((self.target / squared.sqrt())[:, None, None])

    def weights(self, i: int) -> list[torch.Tensor]:
        return [w[i].detach() for w in self.parameters]


class EagerTrainPairs(EagerAutograd):
    """The same without the wasted test pairs: 40% of the rows, everything else equal. The strongest plain eager code."""
    name = "eager_train_pairs"

    def take_pairs(self, a: torch.Tensor, b: torch.Tensor, p: int) -> None:
        self.a, self.b, self.labels, self.share = a, b, (a + b) % p, torch.full(a.shape, 1 / a.shape[1], device=a.device)


class CompiledAutograd(EagerAutograd):
    """The released way under torch.compile: forward, backward, optimiser and clamp."""
    name = "compiled_autograd"

    def __init__(self, *args: object):
        EagerAutograd.__init__(self, *args)
        self.loss = torch.compile(self.loss, dynamic=False)
        self.update = torch.compile(self.optimizer.step, dynamic=False)
        self.clamp = torch.compile(self.clamp, dynamic=False)

    def steps(self, k: int) -> None:
        for _ in range(k):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            self.update()
            self.clamp()


class Vmap:
    """torch.func: one run's step written plainly, vmapped over runs."""
    name = "vmap"

    def __init__(self, weights: list, a: torch.Tensor, b: torch.Tensor, p: int, target: float, lr: float, weight_decay: float):
        self.parameters = tuple(weights)
        self.moments = tuple(torch.zeros_like(w) for w in weights), tuple(torch.zeros_like(w) for w in weights)
        self.a, self.b, self.t = a, b, 0

        def loss(parameters: tuple, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            E, W1, W2, b1, b2 = parameters
            z = F.gelu(torch.cat([E[a], E[b]], dim=-1) @ W1 + b1) @ W2 + b2
            return F.cross_entropy(z, (a + b) % p)

        def step(parameters: tuple, m: tuple, v: tuple, a: torch.Tensor, b: torch.Tensor, bias1: float, bias2: float) -> tuple:
            gradient = torch.func.grad(loss)(parameters, a, b)
            m = tuple(x * BETAS[0] + g * (1 - BETAS[0]) for x, g in zip(m, gradient, strict=True))
            v = tuple(x * BETAS[1] + g * g * (1 - BETAS[1]) for x, g in zip(v, gradient, strict=True))
            decay = (1 - lr * weight_decay,) * 3 + (1.0,) * 2
            new = [w * c - lr / bias1 * x / (y.sqrt() / math.sqrt(bias2) + EPS) for w, c, x, y in zip(parameters, decay, m, v, strict=True)]
            scale = target / sum(w.square().sum() for w in new[:3]).sqrt()
            return (*(w * scale for w in new[:3]), *new[3:]), m, v
        self.step = torch.vmap(step, in_dims=(0, 0, 0, 0, 0, None, None))

    def steps(self, k: int) -> None:
        for _ in range(k):
            self.t += 1
            bias = 1 - BETAS[0] ** self.t, 1 - BETAS[1] ** self.t
            self.parameters, *moments = self.step(self.parameters, *self.moments, self.a, self.b, *bias)
            self.moments = tuple(moments)

    def weights(self, i: int) -> list[torch.Tensor]:
        return [w[i] for w in self.parameters]


class GraphSeparable:
    """The strongest hand-batched code: our algebra (separable first layer, closed-form gradient, one flat row per run) in batched torch
    operations; on CUDA all k steps are one CUDA graph, on a CPU they run eagerly."""
    name = "graph_separable"

    def __init__(self, weights: list, a: torch.Tensor, b: torch.Tensor, p: int, target: float, lr: float, weight_decay: float):
        R, _, d = weights[0].shape
        self.p, self.target, self.lr, self.weight_decay, self.t = p, target, lr, weight_decay, 0
        self.row = torch.cat([w.flatten(1) for w in weights], 1)                         # (R, N)
        self.m, self.v = torch.zeros_like(self.row), torch.zeros_like(self.row)
        self.shapes, self.sizes = [w.shape[1:] for w in weights], [w[0].numel() for w in weights]
        first = p * torch.arange(R, device=a.device)[:, None]
        self.U_row, self.V_row, self.d = (first + a).flatten(), (first + b).flatten(), d  # (R n): rows of the stacked tables
        self.onehot = F.one_hot((a + b) % p, p).to(self.row.dtype)
        self.scalars, self.graph = torch.zeros(0, 2, device=a.device), None

    def step(self, size: torch.Tensor, root: torch.Tensor) -> None:
        R, p, n = len(self.row), self.p, self.onehot.shape[1]
        E, W1, W2, b1, b2 = (x.view(R, *s) for x, s in zip(self.row.split(self.sizes, 1), self.shapes, strict=True))
        Wa, Wb = W1[:, : self.d], W1[:, self.d:]
        U, V = torch.baddbmm(b1, E, Wa).flatten(0, 1), (E @ Wb).flatten(0, 1)            # (R p, H)
        x = (U[self.U_row] + V[self.V_row]).view(R, n, -1)
        Phi = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        h = x * Phi
        dz = (torch.softmax(torch.baddbmm(b2, h, W2), -1) - self.onehot) / n
        dx = (dz @ W2.mT) * (Phi + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))
        dU, dV = (torch.zeros_like(U).index_add_(0, i, dx.flatten(0, 1)).view(R, p, -1) for i in (self.U_row, self.V_row))
        dW1 = torch.cat([E.mT @ dU, E.mT @ dV], 1)
        parts = (torch.baddbmm(dU @ Wa.mT, dV, Wb.mT), dW1, h.mT @ dz, dU.sum(1), dz.sum(1))
        g = torch.cat([part.flatten(1) for part in parts], 1)
        self.m.lerp_(g, 1 - BETAS[0])
        self.v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        held = self.row[:, : sum(self.sizes[:3])]
        held.mul_(1 - self.lr * self.weight_decay)
        self.row.sub_(size * self.m / (self.v.sqrt() / root + EPS))
        held.mul_(self.target / held.norm(dim=1, keepdim=True))

    def steps(self, k: int) -> None:
        t = torch.arange(self.t + 1, self.t + k + 1, dtype=torch.float64)
        scalars = torch.stack([self.lr / (1 - BETAS[0] ** t), (1 - BETAS[1] ** t).sqrt()], 1).to(self.row.dtype)
        self.t += k
        if self.row.device.type != "cuda":
            for size, root in scalars:
                self.step(size, root)
            return
        if len(self.scalars) != k:                                                       # warm up, then capture k steps
            self.scalars = scalars.to(self.row.device)
            kept = [x.clone() for x in (self.row, self.m, self.v)]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(*self.scalars[0])
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                for size, root in self.scalars:
                    self.step(size, root)
            for x, before in zip((self.row, self.m, self.v), kept, strict=True):
                x.copy_(before)
        self.scalars.copy_(scalars)
        self.graph.replay()
        torch.cuda.synchronize()

    def weights(self, i: int) -> list[torch.Tensor]:
        return [x.view(s) for x, s in zip(self.row[i].split(self.sizes), self.shapes, strict=True)]


class JaxVmap:
    """JAX: vmap over runs inside lax.scan over steps, float32 at highest precision, on this machine's default device."""
    name = "jax_vmap"

    def __init__(self, weights: list, a: torch.Tensor, b: torch.Tensor, p: int, target: float, lr: float, weight_decay: float):
        import jax
        import jax.numpy as jnp
        jax.config.update("jax_default_matmul_precision", "highest")
        self.jax, self.t = jax, 0
        zeros = [jnp.zeros(w.shape, jnp.float32) for w in weights]
        self.state = [jnp.asarray(w.cpu().numpy()) for w in weights], zeros, zeros
        a, b = jnp.asarray(a.cpu().numpy()), jnp.asarray(b.cpu().numpy())

        def loss(parameters: list, a: object, b: object) -> object:
            E, W1, W2, b1, b2 = parameters
            z = jax.nn.gelu(jnp.concatenate([E[a], E[b]], -1) @ W1 + b1, approximate=False) @ W2 + b2
            return -jnp.take_along_axis(jax.nn.log_softmax(z), ((a + b) % p)[:, None], 1).mean()

        def step(parameters: list, m: list, v: list, a: object, b: object, t: object) -> tuple:
            gradient = jax.grad(loss)(parameters, a, b)
            m = [x * BETAS[0] + g * (1 - BETAS[0]) for x, g in zip(m, gradient, strict=True)]
            v = [x * BETAS[1] + g * g * (1 - BETAS[1]) for x, g in zip(v, gradient, strict=True)]
            size, root = lr / (1 - BETAS[0] ** t), jnp.sqrt(1 - BETAS[1] ** t)
            decay = (1 - lr * weight_decay,) * 3 + (1.0,) * 2
            new = [w * c - size * x / (jnp.sqrt(y) / root + EPS) for w, c, x, y in zip(parameters, decay, m, v, strict=True)]
            scale = target / jnp.sqrt(sum((w * w).sum() for w in new[:3]))
            return [*(w * scale for w in new[:3]), *new[3:]], m, v

        def many(state: tuple, times: object) -> tuple:
            def one(state: tuple, t: object) -> tuple:
                return jax.vmap(step, in_axes=(0, 0, 0, 0, 0, None))(*state, a, b, t), None
            return jax.lax.scan(one, state, times)[0]
        self.many = jax.jit(many)

    def steps(self, k: int) -> None:
        times = self.jax.numpy.arange(self.t + 1, self.t + k + 1, dtype=self.jax.numpy.float32)
        self.state, self.t = self.jax.block_until_ready(self.many(self.state, times)), self.t + k

    def weights(self, i: int) -> list[torch.Tensor]:
        import numpy as np
        return [torch.from_numpy(np.array(w[i])) for w in self.state[0]]


class Transformer(EagerAutograd):
    """Three tokens a pair, attention and MLP at the last position only; nine matrices, all decayed and held."""
    n_weights, normed = 9, False

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:]) if self.normed else x

    def loss(self) -> torch.Tensor:
        E, pos, Wq, Wk, Wv, Wo, Win, Wout, U = self.parameters
        tokens = torch.stack([self.a, self.b, torch.full_like(self.a, E.shape[1] - 1)], 2)          # (R, pairs, 3)
        x = E[self.run[:, :, None], tokens] + pos[:, None]                                          # (R, pairs, 3, d)
        y, last = self.norm(x).flatten(1, 2), x[:, :, 2]
        q = (self.norm(last) @ Wq).unflatten(-1, (4, 1, -1))                                        # (R, pairs, heads, 1, dh)
        k, v = ((y @ W).unflatten(1, (-1, 3)).unflatten(-1, (4, -1)).transpose(2, 3) for W in (Wk, Wv))
        o = F.scaled_dot_product_attention(q, k, v).flatten(2)                                      # (R, pairs, d)
        r = last + o @ Wo
        r = r + F.gelu(self.norm(r) @ Win) @ Wout
        z = self.norm(r) @ U
        each = F.cross_entropy(z.flatten(0, 1), self.labels.flatten(), reduction="none").view(self.labels.shape)
        return (each * self.share).sum()


class TransformerTrainPairs(Transformer):
    """The same without the wasted test pairs."""
    name, take_pairs = "eager_train_pairs", EagerTrainPairs.take_pairs


class CompiledTransformer(Transformer):
    """The released way under torch.compile."""
    name, __init__, steps = "compiled_autograd", CompiledAutograd.__init__, CompiledAutograd.steps


class CompiledTransformerTrainPairs(CompiledTransformer):
    """The strongest general code: training pairs only, compiled."""
    name, take_pairs = "compiled_train_pairs", EagerTrainPairs.take_pairs


def peers(model: str = "mlp") -> list[type]:
    """JAX is an optional extra: its row is there where it can be imported."""
    if model != "mlp":
        kinds = Transformer, TransformerTrainPairs, CompiledTransformer, CompiledTransformerTrainPairs
        return [type(kind.__name__, (kind,), {"normed": model == "transformer_ln"}) for kind in kinds]
    return [EagerAutograd, EagerTrainPairs, CompiledAutograd, Vmap, GraphSeparable] + ([JaxVmap] if importlib.util.find_spec("jax") else [])
