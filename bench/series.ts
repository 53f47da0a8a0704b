import type {Datapath} from '../src/loader/datapath.js';
import {native} from '../src/native.js';
import type {As, Pod} from '../test/helpers/world.js';

export interface Quantiles {
	readonly p50: number;
	readonly p99: number;
}

/** ns. */
export interface Latency {
	/** Of connect(2). */
	readonly connect: Quantiles;
	/** From socket(2) to close(2), with the time to the first byte from the other side. */
	readonly lifetime: Quantiles;
}

/** Run time of BPF programs for each connection, ns. */
export interface RunTime {
	readonly connect4: number;
	readonly all: number;
}

interface Sample {
	readonly connect: number;
	readonly lifetime: number;
}

/** Before what is measured, so that caches are warm. */
const WARM_UP = 50;
const RUN_TIME_PASSES = 5;

export const quantile = (values: readonly number[], part: number) => [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) * part)]!;
export const median = (values: readonly number[]) => quantile(values, 0.5);

/** Connections of one pod to one destination. */
export class Series {
	readonly rounds: Latency[] = [];

	/** @param greeting - how what it reaches begins: anything else is an error. */
	constructor(readonly pod: Pod, readonly to: string, readonly greeting: string, readonly as: As = {}) {}

	measure(connections: number): void {
		const samples = this.#connect(connections);
		const quantiles = (which: keyof Sample): Quantiles => {
			const taken = samples.map(sample => sample[which]);
			return {p50: median(taken), p99: quantile(taken, 0.99)};
		};
		this.rounds.push({connect: quantiles('connect'), lifetime: quantiles('lifetime')});
	}

	get latency(): Latency {
		return medians(this.rounds);
	}

	/** The median over the rounds of how this compares to `other` in the same round. */
	ratioTo(other: Series): Latency {
		return medians(this.rounds.map((round, index) => {
			const reference = other.rounds[index]!;
			const ratio = (which: keyof Latency): Quantiles => ({p50: round[which].p50 / reference[which].p50, p99: round[which].p99 / reference[which].p99});
			return {connect: ratio('connect'), lifetime: ratio('lifetime')};
		}));
	}

	/** Connects again, as reading the clock for each run costs time itself. */
	runTime(datapath: Datapath, connections: number): RunTime {
		const stats = native.enableStats();
		try {
			const passes = Array.from({length: RUN_TIME_PASSES}, () => this.#runTime(datapath, connections));
			return {connect4: median(passes.map(({connect4}) => connect4)), all: median(passes.map(({all}) => all))};
		} finally {
			native.closeFd(stats);
		}
	}

	#runTime(datapath: Datapath, connections: number): RunTime {
		const before = readPrograms(datapath);
		this.#connect(connections);
		const after = readPrograms(datapath);
		const made = connections + WARM_UP;
		const runs = after.get('connect4')!.runs - before.get('connect4')!.runs;
		if (runs !== made) {
			throw new Error(`${this.pod.name} made ${made} connections, and connect4 ran ${runs} times`);
		}

		const spent = new Map([...after].map(([name, {ns}]) => [name, (ns - before.get(name)!.ns) / made]));
		return {connect4: spent.get('connect4')!, all: [...spent.values()].reduce((sum, ns) => sum + ns, 0)};
	}

	#connect(connections: number): readonly Sample[] {
		const {code, stdout, stderr} = this.pod.run([this.pod.world.program('connector'), this.to, String(WARM_UP), String(connections), this.greeting], this.as);
		if (code !== 0) {
			throw new Error(`${this.pod.name} to ${this.to}: ${stderr}`);
		}

		return stdout.trimEnd().split('\n').map(line => JSON.parse(line) as Sample);
	}
}

function medians(rounds: readonly Latency[]): Latency {
	const of = (which: keyof Latency): Quantiles => ({p50: median(rounds.map(round => round[which].p50)), p99: median(rounds.map(round => round[which].p99))});
	return {connect: of('connect'), lifetime: of('lifetime')};
}

export function readPrograms(datapath: Datapath): ReadonlyMap<string, {readonly runs: number; readonly ns: number}> {
	return new Map([...datapath.programs].map(([name, program]) => {
		const {runCount, runTimeNs} = program.info();
		return [name, {runs: Number(runCount), ns: Number(runTimeNs)}];
	}));
}
