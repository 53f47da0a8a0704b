import path from 'node:path';

/** Where things are pinned. Computes paths only, does no I/O. */
export class PinLayout {
	readonly base: string;
	readonly current: string;
	/** Being built or being taken away; never in use. */
	readonly stage: string;

	/** @param bpffs - where a bpf file system is mounted, e.g. /sys/fs/bpf. */
	constructor(readonly bpffs: string, readonly version: number) {
		this.base = path.join(bpffs, 'sidestep');
		this.current = path.join(this.base, `v${version}`);
		this.stage = path.join(this.base, 'stage');
	}

	/** The same place's pins of another layout. */
	of(version: number): PinLayout {
		return new PinLayout(this.bpffs, version);
	}

	map(name: string, root = this.current): string {
		return path.join(root, 'maps', name);
	}

	program(name: string, root = this.current): string {
		return path.join(root, 'progs', name);
	}

	link(name: string, root = this.current): string {
		return path.join(root, 'links', name);
	}

	/** The inbound program's link to a pod's namespace. */
	podLink(cookie: bigint, root = this.current): string {
		return path.join(root, 'pods', String(cookie));
	}
}
