"""Put small faults into the package, one at a time, and show that a test catches each.

    python ci/mutate.py [--only TEXT ...] [--part I/N] [--table FILE]

Every fault is applied to a temporary copy of the repository, where a few quick tests run until
the first failure; without a fault they must pass. Prints a table; the exit status is 1 if a fault
survives.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# A fault may also make the kernel hang. The first limit is processor time, so that a busy machine
# does not look like a hang; the second is real time, for a process that waits without using any.
CPU_SECONDS, SECONDS = 100, 900


class Fault(NamedTuple):
    """`old` occurs in `path` exactly once and becomes `new`.

    `tests`: "FOLDER/FILE:NAMES", the tests in tests/FOLDER/test_FILE.py that pytest -k selects.
    """

    what: str
    tier: str
    tests: str
    path: str
    old: str
    new: str


STEP, RULE, MEMORY, QUEUE, SUMS, L2, UPDATE, TUNING, RESIDENT, LAST = (
    f"kernels/{n}.py"
    for n in (
        "lars_step", "lars_rule", "memory", "queue", "sums", "l2norm", "lars_update", "tuning",
        "lars_resident", "last_chunk",
    )
)  # fmt: skip
ENGINE, STEPPED, STATE, TORCH_PART, PARTITION, CHK, PLAN, TABLES, POOL, PORTABLE, TENSORS = (
    f"lars_fused/_engine/{n}.py"
    for n in (
        "engine", "prepared_step", "new_state", "torch_part", "partition", "validate", "plan",
        "launch_tables", "graph_pool", "portable", "tensors",
    )
)  # fmt: skip
RATES, FUSED, SMALL, LARGE, DECAYED, RANKS, MEMBERS, CALLERS, QUEUE_STATE, WARNED, PARAMS = (
    f"lars_fused/_engine/{n}.py"
    for n in (
        "rates", "fused", "small_batch", "large_tensor", "decayed_norm", "rank_check", "members",
        "callers", "queue_state", "fallback", "parameters",
    )
)  # fmt: skip
TORCH_STEP = "lars_fused/_engine/torch_step.py"
SGD_KERNEL = "lars_fused/_engine/sgd_kernel.py"
REF, OPT, OPTIONS, CKPT, MONITOR = (
    f"lars_fused/{n}.py"
    for n in ("reference", "optimizer", "options", "checkpoints/load", "monitor")
)
# Tests that catch more than one.
BY_HAND = "reference:by_hand"
EVERY_BACKEND = "engine/torch_step:every_option"
EVERY_OPTION = "contract/options:every_option_changed"
SIZES = "contract/tensors:sizes_around"
EXTREMES = "contract/magnitudes:finite_input or extreme_chunk"
FALLBACK = "contract/environment:a_failing_launch"
LOADING = "contract/checkpoints:misfit or aliases_nothing"
HISTORY = "contract/tensors:frozen_late or more_patterns"
BITWISE = "kernels/bitwise:one_launch"
REGIMES = "kernels/compiled:regime"
# One build each: the one-launch kernel in fp32 for sm_90.
FP32_STEP = "sm_90 and lars_step and not bf16 and not fp16 and not atomic"
ORDER = "kernels/walk:data_is_asked and sm_90 and not bf16 and not fp16 and not atomic"
BUDGET = f"kernels/codegen:stay_in_budget and {FP32_STEP}"
WIDE = f"kernels/codegen:wide_accesses and {FP32_STEP}"
LATENCY = "kernels/walk:latencies and sm_90"
BATCH = f"kernels/walk:loads_of_a_block and {FP32_STEP}"
SLEEP = f"kernels/walk:sleeps_between and {FP32_STEP}"
TAIL = "kernels/walk:tail_has and sm_90"
HELD = "kernels/walk:told_what_to_keep and sm_90"
FAULTS = [
    Fault("momentum is forgotten", "interpret", EVERY_OPTION, RULE,
          "v = momentum * v + keep * u", "v = keep * u"),
    Fault("nesterov ignored", "interpret", EVERY_OPTION, RULE,
          "tl.where(nesterov, u + momentum * v, v), v", "v, v"),
    Fault("decay left out of the update", "interpret", EVERY_OPTION, RULE,
          "u = direction(w, g, factor, decay)", "u = direction(w * 0, g, factor, decay)"),
    Fault("first step is dampened", "interpret", EVERY_OPTION, RULE,
          "tl.where(fresh | (momentum == 0), 1.0,", "tl.where(momentum == 0, 1.0,"),
    Fault("tail of a block dropped", "interpret", SIZES, SUMS,
          "while done < count:", "while done + 1 < count:"),
    Fault("small sums not rescued", "ptx", EXTREMES, SUMS,
          "SUM_FLOOR = tl.constexpr(2.0**-80)", "SUM_FLOOR = tl.constexpr(-1.0)"),
    Fault("large sums not rescued", "ptx", EXTREMES, SUMS,
          "(total > SUM_FLOOR) & (total < SUM_CEILING)", "total > SUM_FLOOR"),
    Fault("bf16 truncated", "interpret", "contract/tensors:sizes_around or another_dtype", MEMORY,
          "rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "rounded = bits >> 16"),
    Fault("zero weights not special", "ptx", "contract/magnitudes:zeros", RULE,
          "adapt & (w_norm != 0) & (norm != 0)",
          "adapt & (norm != 0)"),
    Fault("zero gradients not special", "ptx", "contract/magnitudes:zeros", RULE,
          "adapt & (w_norm != 0) & (norm != 0)",
          "adapt & (w_norm != 0)"),
    Fault("eps ignored", "interpret", EVERY_OPTION, RULE,
          "* w_norm + eps",
          "* w_norm"),
    Fault("decayed norm not used", "interpret", EVERY_OPTION, RULE,
          "return (switches & _DECAYED) != 0",
          "return (switches & 0) != 0"),
    Fault("ratio never clipped", "interpret", EVERY_OPTION, RULE,
          "if (switches & _CLIP) != 0:",
          "if (switches & 0) != 0:"),
    Fault("zero norms always decay", "interpret", EVERY_OPTION, RULE,
          "tl.where(adapted, q, tl.where(raw, -1.0, 1.0))", "tl.where(adapted, q, 1.0)"),
    Fault("offsets wrap at 32 bits", "interpret", "contract/memory:huge_tensors", MEMORY,
          "return index.to(tl.int64) * SIZE", "return (index.to(tl.int32) * SIZE).to(tl.int64)"),
    Fault("alignment assumed", "ptx", "contract/tensors:misaligned or flat_buffer", MEMORY,
          "tl.where((flags & _ALIGNED) != 0, count // BLOCK, 0)",
          "(count + BLOCK - 1) // BLOCK"),
    Fault("first chunk's partial sums missed", "interpret", SIZES, SUMS,
          "    done = chunks * 0\n", "    done = chunks * 0 + 1\n"),
    Fault("arrivals not reset", "interpret", SIZES,
          LAST, "tl.store(arrivals + tensor, 0)", "pass"),
    Fault("queue not reset", "interpret", "contract/tensors:zero_dimensions", QUEUE,
          "tl.store(counter, (epoch + taken).to(tl.int64) << TICKET_BITS)",
          "pass"),
    Fault("epoch not raised", "interpret", HISTORY, QUEUE,
          "tl.store(counter, (epoch + taken).to(tl.int64) << TICKET_BITS)",
          "tl.store(counter, epoch.to(tl.int64) << TICKET_BITS)"),
    Fault("maximize ignored by the table", "interpret", EVERY_OPTION, OPTIONS,
          '"maximize the objective", layout.MAXIMIZE',
          '"maximize the objective", 0'),
    Fault("gradient addresses not refreshed", "interpret", "contract/storage:buffers", TABLES,
          "            if new != old:",
          "            if old is None:"),
    Fault("rates not refreshed", "interpret", "contract/options:lr_tensor", TABLES,
          "if options is self._options:",
          "if self._options:"),
    Fault("no fallback after a failed launch", "interpret", FALLBACK, STEPPED,
          "return self._auto and untouched and not split",
          "return False"),
    Fault("version counters not raised", "interpret", "contract/training:version", STEPPED,
          "torch.autograd.graph.increment_version(self._written)", "pass"),
    Fault("gradient strides not compared", "ptx", "contract/tensors:gradient_strides",
          PARTITION, "if t is not None and not validate.same_layout(t, w):",
          "if False:"),
    Fault("reference: dampening ignored", "cpu", BY_HAND, REF,
          "(1 - o.dampening) * u", "u"),
    Fault("reference: decay halved", "cpu", BY_HAND, REF,
          "+ decay * w\n", "+ 0.5 * decay * w\n"),
    Fault("reference: nesterov looks back", "cpu", BY_HAND, REF,
          "u + o.momentum * v if o.nesterov", "u + v if o.nesterov"),
    Fault("reference: lr both inside and outside", "cpu", BY_HAND, REF,
          "out = 1.0 if o.lr_in_momentum else lr", "out = lr"),
    Fault("reference: pieces leave out their last", "cpu", "reference:piece_by_piece", PORTABLE,
          "for at in range(0, shape[dim], step):", "for at in range(0, shape[dim] - 1, step):"),
    Fault("torch: each step is the first", "cpu", HISTORY, TORCH_PART,
          "self._first, self._certain = [False] * len(self._first), self._certain + 1",
          "self._certain = self._certain + 1"),
    Fault("torch: found_inf ignored", "cpu", "contract/amp:only_the_device", TORCH_PART,
          "            if float(flag) != 0:\n                return before\n", ""),
    Fault("torch: dampening ignored", "cpu", EVERY_BACKEND, RATES,
          "whole * (1.0 - o.dampening) if has_buffer else whole", "whole"),
    Fault("torch: zero norms always decay", "cpu", "engine/torch_step:floats", RATES,
          "raw = decay if o.decay_zero_norm else 0.0", "raw = decay"),
    Fault("torch: ratio never clipped", "cpu", EVERY_BACKEND, RATES,
          "    if o.trust_clip:", "    if False:"),
    Fault("torch: strides not compared", "cpu", "engine/fused:layouts", FUSED,
          "if t is not w and not validate.same_layout(t, w):", "if False:"),
    Fault("torch: gaps walked over", "cpu", "engine/fused:layouts", FUSED,
          "if not validate.dense(w):", "if False:"),
    Fault("torch: a new buffer is read", "cpu", "engine/fused:first_step", FUSED,
          "            torch._foreach_zero_(new)", "            pass"),
    Fault("torch: a written weight passes for the step's", "cpu", "engine/decayed_norm:written",
          DECAYED, "if not abs(n_before - n_w) <= 2 * blur + _SUMMED * compute * n_w:",
          "if False:"),
    Fault("torch: rounding passes for a written weight", "cpu",
          "engine/decayed_norm:rounding", DECAYED,
          "<= 2 * blur + _SUMMED * compute * n_w:", "<= _SUMMED * compute * n_w:"),
    Fault("torch: N(d) without the momentum", "cpu", "engine/decayed_norm:before_the_step",
          DECAYED, "moved = kept * v_.double() if v_ is not None else torch.zeros_like(now)",
          "moved = torch.zeros_like(now)"),
    Fault("torch: rows of a batch joined wrongly", "cpu", EVERY_BACKEND, SMALL,
          "if b - a == 1 else sum(squares[a:b])", "if b - a == 1 else squares[a]"),
    Fault("torch: padding of another batch summed", "cpu",
          "engine/small_batch:another_batch", SMALL,
          "if self._padded and self._scratch.clean_for is not self:", "if False:"),
    Fault("torch: one factor for first and later steps", "cpu",
          "engine/small_batch:first_and_later", SMALL, "if f == factor]", "]"),
    Fault("torch: a window's norms mixed up", "cpu", EVERY_BACKEND, LARGE,
          "w, g = found[::2], found[1::2]", "g, w = found[::2], found[1::2]"),
    Fault("torch: a window's table may be of any size", "cpu", "engine/large_tensor:windows", LARGE,
          "if self.index and (elements > WINDOW or 2 * (len(self.index) + 1) * most > TABLE):",
          "if self.index and elements > WINDOW:"),
    Fault("torch: later blocks of a widened tensor not summed", "cpu",
          "engine/large_tensor:several_blocks", LARGE, "        at += count", "        at += 0"),
    Fault("torch: small factors rounded away", "cpu", "engine/fused:small", SGD_KERNEL,
          "return factor == 0 or factor >= LEAST_FACTOR[dtype]", "return True"),
    Fault("kernel: found_inf ignored", "ptx", "contract/amp:only_the_device", STEP,
          "taken = tl.load(found_inf) == 0", "taken = tl.load(found_inf) == tl.load(found_inf)"),
    Fault("hyper-parameters not checked in step", "cpu", "contract/bad_input:in_a_group", ENGINE,
          'table.check(group, f"LARS: param_groups[{g}]: ", read_device=False)',
          "pass"),
    Fault("freed memory not noticed", "cpu", "contract/storage:freed_memory", CHK,
          "if t.numel() > 0 and t.untyped_storage().nbytes() == 0:", "if False:"),
    Fault("shared memory not noticed", "cpu", "contract/refusals:cannot_be_updated", CHK,
          "            if stride < reach:\n                return True",
          "            if stride < 0:\n                return True"),
    Fault("replaced state not compared", "cpu", "contract/storage:state_", TENSORS,
          "or places(seen.tensors) == self.places",
          "or True"),
    Fault("lr tensor of any size allowed", "cpu", "contract/options:lr_tensor", OPTIONS,
          "if value.numel() != 1:",
          "if False:"),
    Fault("loaded state aliases the checkpoint", "cpu", LOADING, CKPT,
          "own = torch.empty_like(part, device=sharding.local(p).device).copy_(part)",
          "own = part"),
    Fault("checkpoint shapes not compared", "cpu", LOADING, CKPT,
          "if value.shape != p.shape:", "if False:"),
    Fault("interrupted launch kept", "interpret", "contract/environment:interrupted", ENGINE,
          "            self.prepared.clear()\n            self.last = []\n            raise",
          "            raise"),
    Fault("falling back warns every time", "interpret", FALLBACK, WARNED,
          "if reason not in _warned:", "if True:"),
    Fault("tables made in inference mode", "interpret", "contract/training:inference", ENGINE,
          "with torch.inference_mode(False), torch.no_grad():",
          "with torch.no_grad():"),
    Fault("tables made on the default device", "interpret", "contract/environment:default", TABLES,
          'torch.tensor(values, dtype=torch.int64, device="cpu")',
          "torch.tensor(values, dtype=torch.int64)"),
    Fault("a copy keeps what a skipped step made", "ptx", "contract/amp:only_the_device", OPT,
          '"state": self._engine.taken_state(self.state), ',
          '"state": self.state, '),
    Fault("compiled: any address called aligned", "ptx", "kernels/accuracy:regime", TABLES,
          "layout.NUMEL] % 16) == 0", "layout.NUMEL] % 4) == 0"),
    Fault("compiled: every thread draws a ticket", "ptx", REGIMES, QUEUE,
          "mask=lane == 0, sem", "mask=lane >= 0, sem"),
    Fault("compiled: tails read past their tensor", "ptx", REGIMES, SUMS,
          "turn * THREADS + thread < count",
          "turn * THREADS + thread <= count"),
    Fault("compiled: a part of each block not summed", "ptx", REGIMES, SUMS,
          "THREADS, VECTOR])\n", "THREADS, VECTOR]) * (tl.arange(0, VECTOR) > 0)\n"),
    Fault("machine code: ticket received before data is asked for", "codegen", ORDER, STEP,
          "            w, g, v = load_triple(",
          "            next_ticket = receive(drawn, THREADS)\n            w, g, v = load_triple("),
    Fault("machine code: ratio waited for before data is asked for", "codegen", ORDER, STEP,
          "            w, g, v = load_triple(",
          "            asked = ask(flags + tensor, POLL_ATOMIC)\n"
          "            wait_for_ratio(asked, flags + tensor, epoch, POLL_ATOMIC, BACKOFF)\n"
          "            w, g, v = load_triple("),
    Fault("machine code: next item read at the end", "codegen", LATENCY, STEP,
          "        item = next_item\n",
          "        item = tl.load(items + next_ticket, mask=next_ticket < todo, other=0)\n"),
    Fault("machine code: next item read behind the loop over blocks", "codegen", LATENCY, STEP,
          "                tl.debug_barrier()\n", "                pass\n"),
    Fault("machine code: g is asked for when w is there", "codegen", BATCH, SUMS,
          "g = load_block(g_address, at, there,",
          "g = load_block(g_address, at, there & (tl.max(w.to(tl.float32)) < 3e38),"),
    Fault("machine code: momentum is asked for when w is there", "codegen", BATCH, RULE,
          "mask=there & (v_address != 0), other",
          "mask=there & (v_address != 0) & (tl.max(w.to(tl.float32)) < 3e38), other"),
    Fault("machine code: polls without a pause", "codegen", SLEEP, QUEUE,
          "        if BACKOFF:\n", "        if BACKOFF < 0:\n"),
    Fault("machine code: a tail waits at each turn", "codegen", TAIL, MEMORY,
          "TAIL_TURNS = tl.constexpr(8)", "TAIL_TURNS = tl.constexpr(1)"),
    Fault("machine code: registers for more programs than fit", "codegen", BUDGET, TUNING,
          "launches=1, step_registers=106", "launches=1, step_registers=72"),
    Fault("machine code: whole blocks read element by element", "codegen", WIDE, MEMORY,
          "    if ALIGN > 1:", "    if ALIGN > 16:"),
    Fault("held: a chunk is summed before its copy is waited for", "ptx",
          "kernels/resident:same_bits_as", RESIDENT, "wait_group(1)", "wait_group(2)"),
    Fault("held: a copy goes into a slot that is not free", "ptx",
          "kernels/resident:same_bits_as", RESIDENT,
          "gl.where(slot_1 == SLOTS - 1, 0, slot_1 + 1)",
          "gl.where(slot_1 == SLOTS - 1, 0, slot_1)"),
    Fault("held: nobody waits for a ratio", "ptx", "kernels/resident:same_bits_as", RESIDENT,
          "if waits_for_ratio(old_switches):", "if old_switches < 0:"),
    Fault("held: more than fits", "cpu", "kernels/resident:no_item_waits or ring_holds", TUNING,
          "slots(row, bytes_per_element) - 2", "slots(row, bytes_per_element) - 1"),
    Fault("held: an answer is waited for before the update", "codegen",
          "kernels/resident_codegen:sends_for", RESIDENT,
          "        if (old_kind & _UPDATE) != 0:\n",
          "        arrived = thread * 0 + gl.sum(gl.where(thread == 0, arrived, 0), 0)\n"
          "        if (old_kind & _UPDATE) != 0:\n"),
    Fault("plan: updates right behind their norms", "cpu", "bench/traffic:covers_the_waits", PLAN,
          "pending.append((i, tape.length + lag))", "pending.append((i, tape.length))"),
    Fault("plan: no update held back for the last waits", "cpu", "engine/plan:small_tensor_at_the",
          PLAN, "while first_held and held < lag:", "while first_held and held < 0:"),
    Fault("the cache is not told to hold what is read again", "codegen", HELD, SUMS,
          "G_DT, G_ALIGN, HOLD, EMULATE_BF16)", 'G_DT, G_ALIGN, "", EMULATE_BF16)'),
    Fault("plan: no room for slots", "cpu", "engine/plan:chunk or boundar or slot", PLAN,
          "slots[i], n_slots = n_slots, n_slots + c", "slots[i], n_slots = n_slots, n_slots + 1"),
    Fault("plan: updates before norms", "cpu", "engine/plan:every_chunk", PLAN,
          "for i in group:\n            tape.add(NORM, i)",
          "for i in group[1:]:\n            tape.add(NORM, i)"),
    Fault("two launches: first slot never summed", "ptx", BITWISE, L2,
          "first_slot + chunk, w2, g2, d2)", "first_slot, w2, g2, d2)"),
    Fault("two launches: decay of the wrong half", "ptx", BITWISE, UPDATE,
          "used = G2 + (D2 - G2)",
          "used = D2 + (G2 - D2)"),
    Fault("a prepared step matches any dtype", "cpu", "engine/prepared_step:relied_on", TENSORS,
          "if seen.fingerprint[1:] != self.fingerprint[1:]:", "if False:"),
    Fault("a prepared step ignores the plan's options", "cpu", "engine/prepared_step:plan_depends",
          STEPPED, "facts == self._plan_facts and ", ""),
    Fault("replaced state tensors not noticed", "cpu", "engine/prepared_step:put_in_place", STATE,
          "return all(map(is_, now, held))", "return True"),
    Fault("dtypes share a launch", "cpu", "engine/partition:one_launch", PARTITION,
          "None if copy is None else copy.dtype,", "None,"),
    Fault("state is the optimizer's before the launch", "interpret", "contract/environment:raises",
          ENGINE, "        try:\n            if self.settings", "        step.state.commit(state)\n"
          "        try:\n            if self.settings"),
    Fault("a certain step leaves a doubt", "cpu", "engine/new_state:certain or settles", STATE,
          "            if certain:\n                del",
          "            if False:\n                del"),
    Fault("a skipped first step is forgotten", "cpu", "engine/new_state:leaves_out", ENGINE,
          "certain=scaling.found_inf is None", "certain=True"),
    Fault("edited parameters not noticed", "cpu", "engine/new_state:masters", ENGINE,
          "self._masters.refresh(step.state)", "pass"),
    Fault("masters lose their low bits", "cpu", "engine/new_state:masters", STATE,
          "torch.where(p == w.to(p.dtype), w, p.float())", "p.float()"),
    Fault("capture without capturable", "interpret", "gpu/emulated_graphs:graphs", STEPPED,
          "            graph_pool.refuse(False, self._caller)\n", "            pass\n"),
    Fault("captured tables are used again", "interpret", "gpu/emulated_graphs:graph", POOL,
          "tables = self._spare.pop(step)", "tables = self._spare[step]"),
    Fault("an option without its word", "cpu", "options_table:word or row", OPTIONS,
          '"weight decay", layout.DECAY', '"weight decay", layout.EPS'),
    Fault("positional hyper-parameters taken", "cpu", "options_table:positional", CALLERS,
          "        if extra:", "        if extra[3:]:"),
    # The seams of the engine, and what stands beside it.
    Fault("seam: momentum above 1 allowed", "cpu", "contract/bad_input:is_refused_with", OPTIONS,
          "layout.MOMENTUM, largest=1.0", "layout.MOMENTUM, largest=2.0"),
    Fault("seam: dampening stored as it is given", "cpu", "options_table:row_encodes", OPTIONS,
          "lambda t: 1.0 - t, 1.0", "lambda t: t, 1.0"),
    Fault("seam: a group with another setting", "cpu", "contract/bad_input:is_refused_with", OPT,
          "if param_group.get(name, value) != value:", "if False:"),
    Fault("seam: partition gives no reason", "cpu", "engine/partition:says_why or named", PARTITION,
          "reasons[i] = reason", "reasons[i] = ''"),
    Fault("seam: the torch backend asks for kernels", "cpu", "engine/partition:asks_no_device",
          PARTITION, 'if backend == "torch":', 'if backend == "none":'),
    Fault("seam: tensors without momentum join any launch", "cpu", "engine/partition:join_no",
          PARTITION, "and other[1]._replace(v=dtypes.v) == dtypes", ""),
    Fault("seam: what torch's backends object to is lost", "cpu", "engine/torch_step:objects_to",
          TORCH_STEP, "reasons[i] = reason", "reasons[i] = ''"),
    Fault("seam: a plan outlives the choice between backends", "cpu",
          "engine/prepared_step:decide_between", STEPPED, ", foreach.expressible(o))", ", True)"),
    Fault("seam: a skipped step forgets what was measured", "cpu",
          "engine/prepared_step:skipped_step", ENGINE, ", ready.measured)", ", None)"),
    Fault("seam: a prepared step matches any memory", "cpu", "engine/prepared_step:relied_on",
          TENSORS, "or places(seen.tensors) == self.places", "or True"),
    Fault("seam: new state is not committed", "cpu", "engine/new_state:once_it_is_committed", STATE,
          "state[self.params[new.at]][new.key] = new.value", "pass"),
    Fault("seam: state is committed anew at each step", "cpu", "engine/new_state:committed", STATE,
          "        self.pending = ()\n", ""),
    Fault("seam: tables of a capture die with its step", "cpu", "engine/graph_pool:outlive",
          POOL, "self._captured.append((tables, tensors._replace(grads=[])))", "pass"),
    Fault("seam: no tables for the next capture", "interpret", "gpu/emulated_graphs:graph", POOL,
          "                self._spare[step] = make()\n", "                pass\n"),
    Fault("seam: a spare of a capture is made in inference mode", "interpret",
          "gpu/emulated_graphs:inference", POOL,
          "with torch.inference_mode(False), torch.no_grad():", "if True:"),
    Fault("seam: the spare of a capture keeps a launch that has failed", "interpret",
          "gpu/emulated_graphs:no_part_of_it", STEPPED,
          "            self._pool.drop(self)\n", ""),
    Fault("queue: an end that others did not see is not noticed", "interpret",
          "kernels/watch:disagreed", QUEUE,
          "lost = (taken == 0) & (tl.load(watch + _LAST_EPOCH) == epoch)", "lost = False"),
    Fault("queue: a ticket after the last is not noticed", "interpret",
          "kernels/watch:after_the_last", QUEUE,
          "        lost = ticket > last\n", "        lost = ticket < last\n"),
    Fault("seam: a step on another stream does not wait for the last", "interpret",
          "gpu/emulated_streams:another_stream", TABLES,
          "            current.wait_stream(self._stream)\n", ""),
    Fault("seam: a stream is not told which tables it uses", "interpret",
          "gpu/emulated_streams:another_stream", TABLES,
          "                table.record_stream(current)\n", "                pass\n"),
    Fault("seam: a clipping factor of another dtype", "interpret",
          "gpu/emulated_streams:clipped", "lars_fused/norms.py",
          'kind = factor.dtype if device.type == "cpu" else dtype', "kind = factor.dtype"),
    Fault("seam: lost work is not noticed", "interpret", "kernels/watch:named or says_so",
          QUEUE_STATE, "if lost or int(counter", "if int(counter"),
    Fault("seam: ranks that disagree go on", "cpu", "distributed/ddp:disagree", RANKS,
          "if all(other == digest for other in digests):", "if digests:"),
    Fault("seam: names of parameters not compared", "cpu", "distributed/ddp:disagree", RANKS,
          """f"{names[i]!r}, " if names else """, """"" if names else """),
    Fault("seam: what runs is not compared", "cpu", "distributed/ddp:what_runs", RANKS,
          "lines = [*runs, *_describe(groups, only)]", "lines = [*_describe(groups, only)]"),
    Fault("seam: every step is recorded", "cpu", "monitor:layer_stats or asked_for", MONITOR,
          "if self._step % self._every == 0 and self._taken != before:", "if True:"),
    Fault("seam: a step that did nothing is recorded", "cpu", "monitor:did_nothing", MONITOR,
          "if self._step % self._every == 0 and self._taken != before:",
          "if self._step % self._every == 0:"),
    Fault("seam: a step that the device skipped is recorded", "cpu", "monitor:does_not_know",
          MONITOR, "if not skipped:", "if True:"),
    Fault("seam: each record is copied at once", "cpu", "monitor:asked_for", MONITOR,
          ">= self._keep:", ">= 1:"),
    Fault("seam: warnings need no patience", "cpu", "monitor:patience", MONITOR,
          "kept.step - since >= self._patience", "kept.step - since >= 0"),
    Fault("seam: warnings are repeated", "cpu", "monitor:said_once", MONITOR,
          "self._said.add(kind)", "pass"),
    Fault("seam: replaced parameters not followed", "cpu", "contract/members:follow_it", MEMBERS,
          "found.append(member if new is None else", "found.append(member if True else"),
    Fault("seam: where parameters come from is forgotten", "cpu",
          "contract/members:after_the_optimizer", MEMBERS, "    origins.note(followed)\n", ""),
    Fault("seam: excluded tensors are decayed", "cpu", "contract/members:one_switch", ENGINE,
          "o._replace(adapt=False, weight_decay=0.0)", "o._replace(adapt=False)"),
    Fault("seam: biases known by name are not excluded", "cpu", "contract/members:one_switch",
          PARAMS, " or (exclude_ndim >= 1 and names and is_bias(names[i]))", ""),
    Fault("seam: Lightning is told that scales are read", "cpu",
          "contract/grad_scaler:lightning_may", CALLERS, "not in _UNSCALE", "is not _UNSCALE"),
]  # fmt: skip


def path_of(fault: Fault) -> Path:
    """The file of the tests that must catch a fault, below the root of a repository."""
    *folder, file = fault.tests.split(":")[0].split("/")
    return Path("tests", *folder, f"test_{file}.py")


def copy_of_repository(to: Path) -> None:
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".hypothesis", ".*_cache", "out", "results", "*.egg-info"
    )
    for name in ("lars_fused", "kernels", "bench", "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignored)
        else:
            shutil.copy(source, to / name)


class Runner:
    """Runs pytest in the copy, in forks of two processes: triton reads TRITON_INTERPRET once."""

    def __init__(self, where: Path) -> None:
        self.where, self._output = where, where / "output"
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def _server(self, interpret: str) -> subprocess.Popen[str]:
        if interpret not in self._servers:
            # Import the copy, not an installed package.
            path = os.pathsep.join(filter(None, [str(self.where), os.environ.get("PYTHONPATH")]))
            env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpret}
            self._servers[interpret] = subprocess.Popen(
                [sys.executable, str(ROOT / "ci" / "forked_pytest.py")],
                env={**env, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        return self._servers[interpret]

    def tests_fail(self, tier: str, file: Path, names: str) -> str | None:
        """The first quick test that fails in the copy, or None."""
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
        arguments += ["-m", f"{tier} and not slow", "-k", names, str(self.where / file)]
        server = self._server("1" if tier == "interpret" else "0")
        order = [str(self.where), arguments, str(self._output), CPU_SECONDS, SECONDS]
        print(json.dumps(order), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        if status == 0:
            return None
        output = self._output.read_text(errors="replace")
        found = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py)(?:::(\w+))?", output, re.MULTILINE)
        if status == 1 and found:
            return "::".join(filter(None, found.groups()))
        if status < 0:
            return f"(ended by signal {-status})"
        raise RuntimeError(f"the tests did not run:\n{output[-4000:]}")


def part_of(faults: list[Fault], part: str) -> list[Fault]:
    """Part i of n, written i/n: whole files of tests, so that few tests run without a fault."""
    number, parts = map(int, part.split("/"))
    groups: dict[tuple[str, Path], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.tier, path_of(fault)), []).append(fault)
    return [fault for group in list(groups.values())[number - 1 :: parts] for fault in group]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of descriptions, any of them"
    )
    parser.add_argument("--part", default="1/1", help="part i of n, as i/n, for several processes")
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    args = parser.parse_args(argv)
    chosen = part_of([f for f in FAULTS if any(text in f.what for text in args.only)], args.part)
    for fault in FAULTS:
        times = (ROOT / fault.path).read_text().count(fault.old)
        if times != 1:
            raise SystemExit(f"{fault.what}: its text occurs {times} times in {fault.path}")
    lines = ["| fault | file | tier | caught by |", "|---|---|---|---|"]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        copy_of_repository(where)
        runner = Runner(where)
        names: dict[tuple[str, Path], set[str]] = {}
        for fault in chosen:
            names.setdefault((fault.tier, path_of(fault)), set()).add(fault.tests.split(":")[1])
        for (tier, file), selections in names.items():
            either = " or ".join(f"({selection})" for selection in sorted(selections))
            if caught := runner.tests_fail(tier, file, either):
                raise SystemExit(f"without any fault {file} fails ({tier}, {either}): {caught}")
        print(*lines, sep="\n", flush=True)
        for fault in chosen:
            source = where / fault.path
            whole = source.read_text()
            source.write_text(whole.replace(fault.old, fault.new))
            caught = runner.tests_fail(fault.tier, path_of(fault), fault.tests.split(":")[1])
            source.write_text(whole)
            survivors += caught is None
            by = f"`{caught}`" if caught else "**nothing**"
            lines.append(f"| {fault.what} | `{fault.path}` | {fault.tier} | {by} |")
            print(lines[-1], flush=True)
    summary = f"{len(chosen)} faults, {survivors} survivors"
    print(summary)
    if args.table:
        args.table.write_text("\n".join([*lines, "", summary, ""]))
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
