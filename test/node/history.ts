/** One pod's name through the time that a test looks at it, and what is drawn for it. */
import {randomOf} from '../helpers/contract.js';
import type {HostProcess, Space} from '../helpers/fake-host.js';
import type {Entry, PodFacts, Told} from './model.js';

export type Labels = Readonly<Record<string, string>>;

export class Draw {
	constructor(readonly random: () => number) {}

	chance(probability: number): boolean {
		return this.random() < probability;
	}

	below(bound: number): number {
		return Math.floor(this.random() * bound);
	}

	one<T>(choices: readonly T[]): T {
		return choices[this.below(choices.length)]!;
	}

	/** By weight. */
	weighed<T>(choices: ReadonlyArray<readonly [weight: number, choice: T]>): T {
		let left = this.random() * choices.reduce((sum, [weight]) => sum + weight, 0);
		return choices.find(([weight]) => (left -= weight) < 0)![1];
	}

	uuid(): string {
		const digits = Array.from({length: 32}, () => this.below(16).toString(16)).join('');
		return digits.replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');
	}
}

/** A network namespace that the runtime made for a pod, and what lives in it. */
export interface Sandbox {
	readonly uid: string;
	/** In its processes' cgroups. */
	readonly cgroupUid: string;
	readonly space: Space;
	/** The runtime's name for it. */
	readonly id: string;
	file: string | undefined;
	readonly processes: Set<HostProcess>;
	/** It was taken down, and something in it goes on. */
	isLeft: boolean;
}

export class History {
	readonly log: string[] = [];
	readonly draw: Draw;
	stepsLeft: number;
	/** What the API server has. */
	pod: PodFacts | undefined;
	/** What the agent has heard while the server is away. */
	heard: PodFacts | undefined;
	/** What became of the pod while the server was away. */
	readonly missed: Array<PodFacts | undefined> = [];
	told: Told | undefined;
	/** What the agent has asked for on a CNI call, as it had heard of another pod of the name, or none. */
	called: {readonly pod: PodFacts; readonly formerUid: string | undefined} | undefined;
	/** Where the agent was right to have it captured. */
	seen: {readonly uid: string; readonly space: Space} | undefined;
	readonly sandboxes: Sandbox[] = [];
	/** Namespaces that are in use for a short time. */
	readonly inner = new Set<HostProcess>();
	/** What the kernel may hold. */
	possible: ReadonlyArray<Entry | undefined> = [undefined];
	/** The agent was told nothing of what has changed since this round. */
	silentSince: number | undefined;
	isBusy = false;
	readonly form: number;
	former: Sandbox | undefined;

	constructor(readonly index: number, readonly name: string, seed: number) {
		this.draw = new Draw(randomOf(seed + Math.imul(index, 0x9e_37_79_b1)));
		this.stepsLeft = 2 + this.draw.below(7);
		this.form = this.draw.below(5);
	}

	get namespace(): string {
		return this.name.split('/')[0]!;
	}

	get sandbox(): Sandbox | undefined {
		return this.sandboxes.find(({isLeft}) => !isLeft);
	}

	get isOver(): boolean {
		return this.stepsLeft <= 0 && !this.pod && this.sandboxes.length === 0 && !this.isBusy;
	}
}
