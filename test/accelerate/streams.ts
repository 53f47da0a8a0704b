/** Runs test/programs/streams.c: random streams of which every byte is compared. */
import {fileURLToPath} from 'node:url';
import type {Running} from '../helpers/process.js';
import type {Pod} from '../helpers/world.js';

const STREAMS = fileURLToPath(new URL('../../../build/test/streams', import.meta.url));

/** A stream that failed (`unplaced`: wrong bytes, but too few to tell where from), with what it takes to run it again alone. */
export interface StreamFailure {
	readonly stream: number;
	readonly failure: 'reordered' | 'duplicated' | 'corrupt' | 'unplaced' | 'lost' | 'surplus' | 'again' | 'error' | 'hung';
	readonly detail: string;
	readonly reproduce: string;
}

export interface StreamsResult {
	readonly seed: number;
	readonly streams: number;
	readonly wrong: number;
	readonly hung: number;
	readonly bytes: number;
	readonly seconds: number;
	/** Not a failure of the stream: how often FIONREAD promised more or less than there was. */
	readonly fionread: {readonly checked: number; readonly wrong: number};
	/** Streams whose client had data acknowledged that it sent in its SYN. */
	readonly fast_opened: number;
	/** Streams, or ends of streams, that had each trait. */
	readonly drawn: Readonly<Record<string, number>>;
}

export interface StreamsRun {
	readonly result: StreamsResult;
	readonly failures: readonly StreamFailure[];
	/** Its lines as they are, for a log. */
	readonly text: string;
}

/** A recipe ends at the first wrong byte: then there is only the failure. */
export interface H13Result {
	readonly rounds?: number;
	readonly stuck?: number;
	readonly failure?: 'reordered' | 'corrupt';
}

/** What the kernel took from a sender whose reader had stopped, in bytes. */
export interface StoppedRound {
	readonly round: number;
	readonly accepted: number;
	/** Growth of TCP's memory on the whole machine. */
	readonly memory: number;
	readonly reader_memory: number;
	readonly sender_memory: number;
	readonly received: number;
	readonly all: boolean;
}

function commandOf(client: Pod, server: Pod, options: readonly string[], mode: readonly string[] = []): readonly string[] {
	// `server` is entered by the thread that listens.
	return [STREAMS, ...mode, ...(client === server ? [] : ['--server-netns', server.netns]), ...options];
}

/** For clients (1) and servers (2), without a cookie (4, 0x200): proxies do not ask for that themselves. */
export function allowFastOpen(...pods: readonly Pod[]): void {
	for (const pod of pods) {
		pod.must('sysctl', '-qw', `net.ipv4.tcp_fastopen=${0x207}`);
	}
}

export function startStreams(client: Pod, server: Pod, to: readonly string[], options: readonly string[] = []): Running {
	return client.start(commandOf(client, server, [...to.flatMap(address => ['--to', address]), ...options]));
}

/** @throws when it ended without a result. */
export async function streamsResult(running: Running): Promise<StreamsRun> {
	await running.ended;
	const lines = running.lines<StreamFailure & StreamsResult>();
	const result = lines.at(-1);
	if (result?.drawn === undefined) {
		throw new Error(`${running.title} ended without a result: ${running.stderr}${running.stdout}`);
	}

	return {result, failures: lines.slice(0, -1), text: running.stdout};
}

export async function runStreams(client: Pod, server: Pod, to: readonly string[], options: readonly string[] = []): Promise<StreamsRun> {
	return streamsResult(startStreams(client, server, to, options));
}

async function recipe<T>(mode: string, client: Pod, server: Pod, to: string, options: readonly string[]): Promise<T[]> {
	const running = client.start(commandOf(client, server, ['--to', to, ...options], [mode]));
	await running.ended;
	const lines = running.lines<T>();
	if (lines.length === 0) {
		throw new Error(`${running.title} ended without a result: ${running.stderr}`);
	}

	return lines;
}

/** KERNEL.md H13 by name. */
export async function runH13(client: Pod, server: Pod, to: string, options: readonly string[] = []): Promise<H13Result> {
	return (await recipe<H13Result>('h13', client, server, to, options)).at(-1)!;
}

/** The same with a partly read segment at the head, from before the server accepted on. */
export async function runHalfRead(client: Pod, server: Pod, to: string, options: readonly string[] = []): Promise<H13Result> {
	return (await recipe<H13Result>('halfread', client, server, to, options)).at(-1)!;
}

/** KERNEL.md H2. */
export async function runStopped(client: Pod, server: Pod, to: string, options: readonly string[] = []): Promise<readonly StoppedRound[]> {
	return recipe<StoppedRound>('stopped', client, server, to, options);
}
