#!/usr/bin/env bash
# The whole path on a bare machine: generates a data set, trains the tiny UGround, evaluates it and asks it a question.
# Two CPU cores, no GPU, 7 to 15 minutes after the packages are installed. An interrupted run resumes when it is
# started again; finished steps are skipped until code, configuration or weights change.
#
#     bash scripts/demo.sh
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

DATA=data/demo
RUN=runs/tiny
LISA=runs/tiny_lisa
DONE=runs/demo
SHARED='ReasonSeg|val_short||ReasonSeg|val_long||grefcoco|unc|val'
TOTAL=10

# Results of other code or weights are moved away: they must not pass for current ones.
fingerprint=$( (cat requirements.txt configs/*.yaml configs/deepspeed/*.json ./*.py scripts/*.py scripts/demo.sh \
    assets/tiny/*/* assets/tiny/sam.pth 2>/dev/null || true; find model utils -name '*.py' -print0 | sort -z | xargs -0 cat) | sha256sum | cut -c1-16)
if [ -d "$DONE" ] && [ "$(cat "$DONE/fingerprint" 2>/dev/null)" != "$fingerprint" ]; then
    old="runs/before-$(date +%Y%m%d-%H%M%S)"
    echo "the code has changed since the last demo; its results are moved to $old"
    mkdir -p "$old"
    for folder in "$DONE" "$RUN" "$LISA"; do
        [ ! -e "$folder" ] || mv "$folder" "$old/"
    done
fi
if [ ! -d "$DONE" ] && { [ -e "$RUN" ] || [ -e "$LISA" ]; }; then
    fail "$RUN or $LISA exists and was not written by this script; move it away and run this again"
fi
mkdir -p "$DONE"
echo "$fingerprint" >"$DONE/fingerprint"

number=0
# step TITLE COMMAND...: runs a step once, and saves its time for the total at the end
step() {
    number=$((number + 1))
    local title=$1 stamp="$DONE/$number.seconds" start=$SECONDS
    shift
    if [ -f "$stamp" ]; then
        printf '[%d/%d] %s: done before\n' "$number" "$TOTAL" "$title"
        return
    fi
    printf '\n[%d/%d] %s\n      %s\n' "$number" "$TOTAL" "$title" "$*"
    "$@" || fail "step $number failed (messages above). After fixing it, run the same command to resume here."
    echo $((SECONDS - start)) >"$stamp"
}

evaluate() { # evaluate MODEL BENCHMARKS OUTPUT [MORE...]
    python test.py --version "$1" --dataset_dir "$DATA" --val_dataset "$2" --output "$3" --mode generate \
        --batch_size 16 --workers 1 "${@:4}"
}

step "generating scenes in the layouts of ReasonSeg, RefCOCO, gRefCOCO and LLaVA-Instruct" \
    python scripts/make_demo_data.py --out "$DATA" --seed 0
step "the model before fine-tuning" \
    python scripts/merge_lora.py --config configs/tiny.yaml --output "$RUN/untrained"
step "training UGround (LoRA, SAM's decoder, policy) with DeepSpeed" \
    deepspeed --num_gpus 1 train_ds.py --config configs/tiny.yaml --auto_resume true
step "training the LISA-style baseline: last layer, [SEG] prompt only; same data, steps and seed" \
    deepspeed --num_gpus 1 train_ds.py --config configs/tiny_lisa.yaml --auto_resume true
step "merging LoRA into UGround" \
    python scripts/merge_lora.py --checkpoint "$RUN" --output "$RUN/merged"
step "merging LoRA into the LISA-style baseline" \
    python scripts/merge_lora.py --checkpoint "$LISA" --output "$LISA/merged"
step "evaluating the model before fine-tuning, layers sampled from its policy, which is still uniform" \
    evaluate "$RUN/untrained" "$SHARED" "$RUN/untrained-eval" --layer_policy sample
step "evaluating the model before fine-tuning, with the layer of its pre-training, the last" \
    evaluate "$RUN/untrained" "$SHARED" "$RUN/untrained-last-eval" --layer_policy last
step "evaluating the LISA-style baseline" \
    evaluate "$LISA/merged" "$SHARED" "$LISA/eval"
step "evaluating UGround, also with shuffled prompts" \
    evaluate "$RUN/merged" "$SHARED||ReasonSeg|heldout||refcoco|unc|val" "$RUN/eval" \
    --control shuffled_prompts --save_overlays 12

cp "$RUN/eval/ReasonSeg_val_long.generate.overlays.png" "$RUN/overlays.png"
photos=("$DATA"/reason_seg/ReasonSeg/val/*.jpg)
photo=${photos[0]}
printf '\nthe model is asked about %s\n' "$photo"
python chat.py --version "$RUN/merged" --image "$photo" --prompt "Which shape is the largest?" --output "$RUN/answers"

printf '\n'
python scripts/compare.py untrained="$RUN/untrained-eval" "untrained, last=$RUN/untrained-last-eval" \
    "LISA-style=$LISA/eval" UGround="$RUN/eval" | tee "$RUN/table.txt"
cat <<END

Untrained: before fine-tuning, with layers sampled from the policy as it starts, or always the last.
Prompts shuffled, "all objects" and "random object": scores of answers that ignore the text.
Time: $(($(cat "$DONE"/*.seconds | paste -sd+))) s for all steps.
Pictures: $RUN/overlays.png (from the worst to the best), $RUN/answers/
Curves:   tensorboard --logdir runs
Talk:     python chat.py --version $RUN/merged --image $photo
END
