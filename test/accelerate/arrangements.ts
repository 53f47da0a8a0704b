/** Where accelerated streams run: a client's pod and a server's, and what is between them. */
import {PROXY_PORT, podEntry} from '../helpers/capture.js';
import type {Agent, Pod, World} from '../helpers/world.js';
import {allowFastOpen} from './streams.js';

export interface Arrangement {
	readonly client: Pod;
	readonly server: Pod;
	readonly to: readonly string[];
	readonly agent: Agent;
	/** Bytes handed from socket to socket so far, of all pods. */
	readonly redirectedBytes: () => number;
	/** Starts another agent, as after a crash. */
	readonly restart: () => Promise<Agent>;
}

interface PodRow {
	readonly acceleration: {readonly redirectedBytes: number};
}

async function arranged(world: World, client: Pod, server: Pod, entries: readonly object[]): Promise<Arrangement> {
	allowFastOpen(client, server);
	const options = ['--acceleration', 'on'];
	return {
		client, server, to: [server.ipv4, server.ipv6],
		agent: await world.agent(entries.map(entry => ({...entry, acceleration: 'on'})), options),
		redirectedBytes: () => world.json<PodRow[]>('pods').reduce((sum, {acceleration}) => sum + Number(acceleration.redirectedBytes), 0),
		restart: async () => {
			const agent = world.startAgent(options);
			await agent.ready();
			return agent;
		},
	};
}

/** client → proxy in its pod → server. */
export async function oneHop(world: World): Promise<Arrangement> {
	const [client, server] = [world.pod('client'), world.pod('server')];
	await client.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', '0x539', '--brief']);
	return arranged(world, client, server, [podEntry(client)]);
}

/** client → proxy in its pod → proxy in the server's pod → server; the proxies read as tokio does (KERNEL.md H13). */
export async function allLocal(world: World): Promise<Arrangement> {
	const pods = [world.pod('client'), world.pod('server')] as const;
	for (const pod of pods) {
		await pod.ztunnel(['--brief']);
	}

	return arranged(world, ...pods, pods.map(pod => ({name: `test/${pod.name}`, netns: pod.netns, mode: 'ambient'})));
}

/** Off and on again, and now and then without an agent for a while, until `ended`. */
export async function disturb({agent, client, restart}: Arrangement, ended: Promise<unknown>, pauseMs = 300): Promise<{readonly switches: number; readonly kills: number}> {
	const {world} = client;
	let [running, done, switches, kills] = [agent, false, 0, 0];
	void ended.then(() => {
		done = true;
	});
	const pause = async () => new Promise(resolve => {
		setTimeout(resolve, pauseMs);
	});
	while (!done) {
		for (const mode of ['off', 'on']) {
			const {code, stderr} = world.sidestep('acceleration', mode);
			if (code !== 0) {
				throw new Error(`sidestep acceleration ${mode}: ${stderr}`);
			}

			switches++;
			await pause();
		}

		if (switches % 6 === 0) {
			await running.running.stop('SIGKILL');
			kills++;
			await pause();
			running = await restart();
			await pause();
		}
	}

	return {switches, kills};
}
