"""The fields that describe a run: data, augmentation, optimisation, and what is kept of it."""

from dataclasses import dataclass
from typing import Literal, NoReturn

from .fields import ConfigError, Fields, limited


@dataclass(frozen=True)
class RunConfig(Fields):
    """A training or evaluation run. Names and defaults are upstream's unless said otherwise.

    Attributes:
        data_set: Which images: scikit-learn's digits (embedded, no path needed), ImageNet or any class folders
            (train/ and val/ under data_path), WebDataset shards from scripts/make_shards.py, torchvision's CIFAR or
            Fashion-MNIST files.
        data_path: Folder of the data.
        eval_data_path: Folder of the evaluation images of image_folder; default: val/ under data_path.
        exif: Turn photographs as their EXIF orientation says, or take them as they are stored, as upstream does.
        skip_corrupt: How many unreadable images each process passes over before it stops.
        num_workers: Loader processes.
        pin_mem: Page-locked memory for batches on their way to a GPU.
        batch_size: Images per process and micro-batch.
        update_freq: Micro-batches per optimizer step.
        epochs: Length of the training.
        start_epoch: First epoch; a resumed run sets it itself.
        seed: Seed of weights, shuffling and augmentation; rank r adds r.
        device: Where to run; auto takes a GPU when there is one.
        use_amp: Mixed precision.
        amp_dtype: Type of mixed precision; float16 scales the loss.
        channels_last: Images and kernels with their channels innermost, which tensor cores prefer.
        tune: Time every implementation in each layer first, for batches of this run on this device, and take the
            fastest; checkpoints keep what was found.
        compile: Compile the training's forward and backward passes (torch.compile).
        sync_bn: Normalise over the batches of all processes together; GPUs only.
        freeze: Regular expressions over parameter names; a parameter that one matches entirely is not trained. Shared
            cells are frozen when they are named, or when all layers that mix from them are frozen.
        opt: Optimizer, any name of timm's factory.
        opt_eps: The optimizer's epsilon; default: its own.
        opt_betas: The optimizer's betas; default: its own.
        momentum: Momentum of SGD (Nesterov).
        weight_decay: Decay of matrices and kernels; never of biases and other vectors.
        weight_decay_end: Where a cosine from weight_decay over the whole run ends; default: no schedule.
        layer_decay: Learning-rate factor from one layer down to the one below it.
        clip_grad: Largest norm of the gradient; default: no clipping.
        max_bad_steps: Steps in a row that may be skipped since loss or gradient is not finite; one more stops the run.
        lr: Peak learning rate, for the total batch, not scaled by anything.
        min_lr: Where the cosine ends.
        warmup_epochs: Epochs of linear warm-up.
        warmup_steps: Optimizer steps of linear warm-up, when positive; it replaces warmup_epochs.
        temp_epoch: Epochs over which the operator's temperature goes from its start to its end; default: those of its
            paper, or a third of the run if that is shorter.
        temp_init_value: Where the temperature starts; default: the operator's own.
        model_ema: Keep an exponential moving average of the weights.
        model_ema_decay: Its decay.
        model_ema_warmup: Let the decay of update t be at most 1 − t^(−2/3), and 1 − 20 / all updates, so that the
            average of a short run forgets its first values; false has the same decay throughout, as the authors' code.
        model_ema_eval: Evaluate it after each epoch too.
        recalibrate_bn: Training batches over which BatchNorm's statistics are estimated anew after each epoch, for the
            network and its average, at most a tenth of the epoch's, but two; 0 keeps running averages, as the authors'
            code does, which lag behind weights that change quickly.
        mixup: Alpha of mixup; 0 turns it off.
        cutmix: Alpha of cutmix; 0 turns it off.
        mixup_prob: Probability of mixing a batch.
        mixup_switch_prob: Probability of cutmix when both are on.
        mixup_mode: Whether images mix per batch, pair or element.
        smoothing: Label smoothing.
        aa: AutoAugment policy in timm's notation; null for none.
        color_jitter: Strength of colour jitter where there is no AutoAugment policy.
        reprob: Probability of random erasing.
        remode: What fills the erased part.
        recount: Number of erased parts.
        repeated_aug: Each image comes three times in a row, augmented anew (DeiT); an epoch sees a third of the images.
        train_interpolation: Interpolation of resizing.
        crop_pct: Share of the resized image that evaluation crops; default: 224/256, or 1 from 384 pixels.
        traditional_preprocess: Training images are only cropped and flipped, as in the MobileNetV2 recipes.
        imagenet_default_mean_and_std: Normalise by ImageNet's statistics, else by Inception's 0.5.
        output_dir: Folder for checkpoints and log.txt; empty: nothing is kept.
        log_dir: Folder for TensorBoard's events; empty: none.
        log_images: How many augmented images of each epoch TensorBoard shows; 0 for none.
        enable_wandb: Record the run with Weights & Biases too, which must be installed.
        save_ckpt: Write checkpoints.
        save_ckpt_freq: Epochs between checkpoints.
        save_ckpt_steps: Optimizer steps between further checkpoints within an epoch; 0 for none.
        save_ckpt_minutes: Minutes between further checkpoints within an epoch; 0 for none.
        save_ckpt_num: How many checkpoints to keep, besides the best.
        auto_resume: Continue from the newest checkpoint in output_dir; without, checkpoints in it are an error.
        resume: Checkpoint to continue from, or to evaluate with eval.
        finetune: Checkpoint whose weights to start from; a classifier of another size is replaced.
        model_key: Entry of a checkpoint that holds the weights, model_ema for their moving average; of several,
            separated by |, the first there is. Default: those that the file was kept for, the average in
            checkpoint-best-ema.pth, else model|module|state_dict.
        eval: Evaluate only.
        eval_sizes: Sides of the images in pixels to evaluate at, one after the other; default: input_size.
        eval_labels: JSON file of other labels for evaluation: for each image, in the order of sorted file names, the
            list of its acceptable classes (ImageNet-ReaL) or the only one; images with an empty list are left out.
        per_class: CSV file for the accuracy of each class.
        confusion: PNG file for the confusion matrix.
        predictions: CSV file for the five most probable classes of each image.
        dry_run: Print the plan, the recipe, and estimates of memory and time; then stop.
        disable_eval: No evaluation during training.
        dist_url: How processes find each other; the default is MASTER_ADDR and MASTER_PORT of the environment.
        local_rank: Set by torch.distributed.launch.
    """

    data_set: Literal["DIGITS", "IMNET", "image_folder", "WDS", "CIFAR10", "CIFAR100", "FMNIST"] = "DIGITS"
    data_path: str = ""
    eval_data_path: str | None = None
    exif: Literal["apply", "ignore"] = "ignore"
    skip_corrupt: int = limited(0, low=0)
    num_workers: int = limited(10, low=0)
    pin_mem: bool = True
    batch_size: int = limited(64, low=1)
    update_freq: int = limited(1, low=1)
    epochs: int = limited(300, low=1)
    start_epoch: int = limited(0, low=0)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    use_amp: bool = False
    amp_dtype: Literal["float16", "bfloat16"] = "float16"
    channels_last: bool = False
    tune: bool = False
    compile: bool = False
    sync_bn: bool = False
    freeze: tuple[str, ...] = ()
    opt: str = "adamw"
    opt_eps: float | None = 1e-8
    opt_betas: tuple[float, ...] | None = None
    momentum: float = 0.9
    weight_decay: float = limited(0.05, low=0)
    weight_decay_end: float | None = limited(None, low=0)
    layer_decay: float = limited(1.0, above=0, high=1)
    clip_grad: float | None = limited(None, above=0)
    max_bad_steps: int = limited(10, low=0)
    lr: float = limited(4e-3, above=0)
    min_lr: float = 1e-6
    warmup_epochs: float = limited(20, low=0)
    warmup_steps: int = -1
    temp_epoch: float | None = limited(None, low=0)
    temp_init_value: float | None = None
    model_ema: bool = False
    model_ema_decay: float = limited(0.9999, low=0, high=1)
    model_ema_warmup: bool = True
    model_ema_eval: bool = False
    recalibrate_bn: int = limited(40, low=0)
    mixup: float = limited(0.8, low=0)
    cutmix: float = limited(1.0, low=0)
    mixup_prob: float = limited(1.0, low=0, high=1)
    mixup_switch_prob: float = limited(0.5, low=0, high=1)
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    smoothing: float = limited(0.1, low=0, high=1)
    aa: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    reprob: float = limited(0.25, low=0, high=1)
    remode: Literal["const", "rand", "pixel"] = "pixel"
    recount: int = limited(1, low=1)
    repeated_aug: bool = False
    train_interpolation: Literal["random", "bilinear", "bicubic"] = "bicubic"
    crop_pct: float | None = limited(None, above=0)
    traditional_preprocess: bool = False
    imagenet_default_mean_and_std: bool = True
    output_dir: str = ""
    log_dir: str = ""
    log_images: int = limited(16, low=0)
    enable_wandb: bool = False
    save_ckpt: bool = True
    save_ckpt_freq: int = limited(1, low=1)
    save_ckpt_steps: int = limited(0, low=0)
    save_ckpt_minutes: float = limited(0, low=0)
    save_ckpt_num: int = limited(3, low=1)
    auto_resume: bool = True
    resume: str = ""
    finetune: str = ""
    model_key: str | None = None
    eval: bool = False
    eval_sizes: tuple[int, ...] = limited((), low=1)
    eval_labels: str = ""
    per_class: str = ""
    confusion: str = ""
    predictions: str = ""
    dry_run: bool = False
    disable_eval: bool = False
    dist_url: str = "env://"
    local_rank: int = -1

    def __post_init__(self):
        super().__post_init__()
        written = self.per_class or self.confusion or self.predictions
        if len(self.eval_sizes) > 1 and written:
            self._refuse("eval_sizes", "a single size where predictions are written or drawn")
        if self.tune and self.compile:
            self._refuse("tune", "false with 'compile', which is code of its own")
        if self.tune and self.sync_bn:
            self._refuse("tune", "false with 'sync_bn', for which processes would have to time the same together")

    def _refuse(self, name: str, rule: str) -> NoReturn:
        raise ConfigError(f"field '{name}': must be {rule}; found {getattr(self, name)!r}")
